"""A phase's figures as Ray metrics, from the rows of its log. docs/METRICS.md is the table of them for a reader."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from shearing.storage import open_store

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Key = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and its labels, in the order of the table."""

STEP_PARTS = ("forward_backward", "communication", "update")
"""Of a step, beside `data`; all that they would be is `compute` while no step has been split."""

AGES = ("shear_last_row_unix_seconds", "shear_checkpoint_unix_seconds")
"""Ages are counted from these, or from the driver's beginning: a run that was stopped over night is not late."""

EXPORT_EVERY_S = 5.0
"""Ray forgets a gauge that was not set for 20 to 30 s, and losses of an evaluation hold for much longer."""


@dataclass(frozen=True)
class Metric:
    """One name of the table. Prometheus knows it as `ray_<name>`; labels come on top of `run` and `phase`."""

    name: str
    unit: str
    labels: tuple[str, ...]
    meaning: str


METRICS = (
    Metric("shear_step", "steps", (), "Steps done"),
    Metric("shear_planned_steps", "steps", (), "Steps that the recipe asks for"),
    Metric("shear_trained_tokens", "tokens", (), "Tokens trained on since step 0"),
    Metric("shear_workers", "workers", (), "Training workers"),
    Metric("shear_restarts", "restarts", (), "How often the phase went on from a checkpoint"),
    Metric("shear_last_row_unix_seconds", "s", (), "When the workers last spoke, or the driver began the phase"),
    Metric("shear_checkpoint_step", "steps", (), "Step of the newest checkpoint"),
    Metric("shear_checkpoint_unix_seconds", "s", (), "Its time, or when the driver began the phase"),
    Metric("shear_training_loss_nats_per_token", "nats/token", (), "Cross-entropy of the last batch"),
    Metric("shear_divergence_nats_per_token", "nats/token", (), "KL from the teacher, in distillation"),
    Metric("shear_not_finite_losses", "losses", (), "Of the last batch and evaluation, how many are no number"),
    Metric("shear_learning_rate", "1", (), "Of the weights"),
    Metric("shear_gradient_norm", "1", (), "Over all weights, before clipping"),
    Metric("shear_loss_nats_per_token", "nats/token", ("domain",), "Loss on held-out text"),
    Metric("shear_reference_loss_nats_per_token", "nats/token", ("domain",), "Loss that the domain should come to"),
    Metric("shear_excess_loss_nats_per_token", "nats/token", ("domain",), "Held-out loss above the reference; 0 below"),
    Metric("shear_proportion", "share", ("domain",), "Of the domain in the batches drawn now"),
    Metric("shear_consumed_sequences", "sequences", ("domain",), "Drawn since step 0"),
    Metric("shear_epochs", "epochs", ("domain",), "The same in passes over the domain's text"),
    Metric("shear_sparsity", "share", ("group",), "Expected share of units that are gone, mean over layers"),
    Metric("shear_target_sparsity", "share", ("group",), "What it should be at this step"),
    Metric("shear_undecided_gates", "gates", ("group",), "Gates that are neither open nor closed"),
    Metric("shear_tokens_per_second", "tokens/s", (), "Of the last step, all workers"),
    Metric("shear_tokens_per_second_per_worker", "tokens/s", (), "The same by worker"),
    Metric("shear_model_flops_utilization", "share", (), "MFU of the last step; only for devices whose peak is known"),
    Metric("shear_part_seconds", "s", ("part",), "The last step's `data`, `forward_backward`, `communication` and "
           "`update`, evaluation's `evaluation` and `mixture`, and `checkpoint`"),
    Metric("shear_spent_seconds", "s", ("part",), "The same, summed over the phase, repeated steps included"),
)  # fmt: skip


@dataclass
class Figures:
    """The newest value of each metric, as rows tell. Free of Ray.

    What a row does not speak of stays; `changed` holds what the last row spoke of.
    """

    values: dict[Key, float] = field(default_factory=dict)
    changed: dict[Key, float] = field(default_factory=dict)
    workers: int = 1
    sequences: dict[str, int] = field(default_factory=dict)
    flops_per_token: float = 0.0
    peak_flops_per_s: float | None = None
    bad_losses: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=lambda: {"compute": 1.0})

    def see(self, row: Row) -> None:
        """Take in one row of the log."""
        kinds: dict[str, Callable[[Row], Iterable[tuple[str, float]]]] = {
            "start": self._start, "step": self._step, "evaluation": self._evaluation, "mixture": self._mixture,
            "checkpoint": self._checkpoint, "event": self._event,
        }  # fmt: skip
        self.changed = {}
        self._set([("last_row_unix_seconds", row["time"]), *kinds[row["kind"]](row)])
        self.values |= self.changed

    def _set(self, found: Iterable[tuple[str, float]], **labels: str) -> None:
        for name, value in found:
            self.changed[f"shear_{name}", tuple(labels.items())] = float(value)

    def _by_domain(self, name: str, values: dict[str, float | None]) -> None:
        for domain, value in values.items():
            if value is not None:
                self._set([(name, value)], domain=domain)

    def _take(self, part: str, seconds: float) -> None:
        self._set([("part_seconds", seconds)], part=part)
        self._spend(part, seconds)

    def _spend(self, part: str, seconds: float) -> None:
        before = self.values.get(("shear_spent_seconds", (("part", part),)), 0.0)
        self._set([("spent_seconds", before + seconds)], part=part)

    def _start(self, row: Row) -> Iterator[tuple[str, float]]:
        self.workers, self.sequences = row["workers"], row["sequences"]
        self.flops_per_token, self.peak_flops_per_s = row["flops_per_token"], row["peak_flops_per_s"]
        self.shares = {"compute": 1.0}
        yield "workers", row["workers"]
        yield "planned_steps", row["planned_steps"]
        yield "step", row["step"]
        yield self._restarts(0)
        if ("shear_checkpoint_step", ()) not in self.values:
            yield "checkpoint_step", row["step"]
            yield "checkpoint_unix_seconds", row["time"]

    def _restarts(self, more: int) -> tuple[str, float]:
        return "restarts", self.values.get(("shear_restarts", ()), 0.0) + more

    def _event(self, row: Row) -> Iterator[tuple[str, float]]:
        yield self._restarts(row["event"] == "resumed")

    def _step(self, row: Row) -> Iterator[tuple[str, float]]:
        yield "step", row["step"]
        yield "trained_tokens", row["tokens"]
        yield "training_loss_nats_per_token", row["loss"]
        yield "learning_rate", row["learning_rate"]
        yield "gradient_norm", row["gradient_norm"]
        yield "tokens_per_second", row["tokens_per_s"]
        yield "tokens_per_second_per_worker", row["tokens_per_s"] / self.workers
        if "divergence" in row:
            yield "divergence_nats_per_token", row["divergence"]
        if self.peak_flops_per_s:
            done_per_s = row["tokens_per_s"] * self.flops_per_token
            yield "model_flops_utilization", done_per_s / (self.workers * self.peak_flops_per_s)
        yield self._not_finite("step", [row["loss"]])
        self._step_parts(row)
        self._by_domain("proportion", row["proportions"])
        self._by_domain("consumed_sequences", row["drawn"])
        self._by_domain("epochs", {d: row["drawn"][d] / size for d, size in self.sequences.items() if size})
        for group, state in row.get("sparsity", {}).items():
            self._set([("sparsity", state["expected"]), ("undecided_gates", state["undecided"])], group=group)
            if state["target"] is not None:
                self._set([("target_sparsity", state["target"])], group=group)

    def _step_parts(self, row: Row) -> None:
        """The step's parts; what was spent in one that was not split is shared out as the last one that was."""
        self._take("data", row["data_wait_s"])
        busy_s = row["step_s"] - row["data_wait_s"]
        if "communication_s" in row:
            parts = {part: row[f"{part}_s"] for part in STEP_PARTS}
            self.shares = {part: seconds / busy_s for part, seconds in parts.items()}
            self.values.pop(("shear_part_seconds", (("part", "compute"),)), None)
            for part, seconds in parts.items():
                self._set([("part_seconds", seconds)], part=part)
        elif "compute" in self.shares:
            self._set([("part_seconds", busy_s)], part="compute")
        for part, share in self.shares.items():
            self._spend(part, share * busy_s)

    def _evaluation(self, row: Row) -> Iterator[tuple[str, float]]:
        losses, references = row["losses"], row["references"]
        self._by_domain("loss_nats_per_token", losses)
        self._by_domain("reference_loss_nats_per_token", references)
        excess = {domain: max(losses[domain] - references[domain], 0.0) for domain in references}
        self._by_domain("excess_loss_nats_per_token", excess)
        waited_s = row.get("mixture_wait_s", 0.0)  # logs of earlier releases do not tell it apart
        self._take("mixture", waited_s)
        self._take("evaluation", row["seconds"] - waited_s)
        yield self._not_finite("evaluation", losses.values())
        yield from self._mixture(row)

    def _mixture(self, row: Row) -> Iterator[tuple[str, float]]:
        self._by_domain("proportion", row["proportions"])
        return iter(())

    def _checkpoint(self, row: Row) -> Iterator[tuple[str, float]]:
        yield "checkpoint_step", row["step"]
        yield "checkpoint_unix_seconds", row["time"]
        self._take("checkpoint", row["seconds"])

    def _not_finite(self, kind: str, losses: Iterable[float]) -> tuple[str, float]:
        self.bad_losses[kind] = sum(not math.isfinite(loss) for loss in losses)
        return "not_finite_losses", sum(self.bad_losses.values())


def run_name(workspace_uri: str) -> str:
    """What a run is called in metrics and trackers: its workspace, without the secrets that a URI may hold."""
    uri, _, _ = open_store(workspace_uri).uri.partition("?")
    return re.sub(r"//[^/@]*@", "//", uri)


class RunMetrics:
    """Shows a phase's figures through `ray.util.metrics`, on the metrics port of the node where the log lives.

    Rows only change numbers in memory; a thread hands them to Ray every few seconds. Trouble here is logged once and
    never reaches the run.

    Args:
        workspace_uri: The run's; the label `run` is made of it.
        phase: The label `phase`.
    """

    def __init__(self, workspace_uri: str, phase: str) -> None:
        from ray.util.metrics import Gauge

        self.labels = {"run": run_name(workspace_uri), "phase": phase}
        self.figures = Figures()
        self.began_unix_s = time.time()
        self.lock = threading.Lock()
        self.gauges = {
            metric.name: Gauge(metric.name, f"{metric.meaning} ({metric.unit})", ("run", "phase", *metric.labels))
            for metric in METRICS
        }
        threading.Thread(target=self._export_for_ever, name="export-metrics", daemon=True).start()

    def recall(self, row: Row) -> None:
        """Take in a row of an earlier life of the log."""
        self.see(row)

    def see(self, row: Row) -> None:
        """Take in one row of the log."""
        with self.lock:
            self.figures.see(row)

    def close(self) -> None:
        """Hand over the last figures."""
        self.export()

    def export(self) -> None:
        """Hand every figure to Ray; before the first row there is one, of phases whose workers never come."""
        with self.lock:
            values = {("shear_last_row_unix_seconds", ()): 0.0} | self.figures.values
        for (name, labels), value in values.items():
            shown = max(value, self.began_unix_s) if name in AGES else value
            self.gauges[name].set(shown, self.labels | dict(labels))

    def _export_for_ever(self) -> None:
        pause = threading.Event()
        while not pause.wait(EXPORT_EVERY_S):
            self.export()
