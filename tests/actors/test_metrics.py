"""The figures of a log's rows, and the table that a reader has of them."""

import json
import math
import re
import time
from pathlib import Path
from typing import ClassVar

import pytest

from actors import metrics
from actors.metrics import METRICS, Figures, RunMetrics

ROOT = Path(__file__).parents[2]
START = {
    "kind": "start",
    "step": 0,
    "time": 100.0,
    "workers": 4,
    "device": "NVIDIA H100 80GB HBM3",
    "planned_steps": 50,
}
START |= {"sequences": {"wiki": 40, "code": 0}, "flops_per_token": 6e9, "peak_flops_per_s": 1e15}
STEP = {"kind": "step", "step": 3, "time": 107.5, "tokens": 1536, "loss": 2.5, "losses": {"wiki": 2.5}}
STEP |= {"learning_rate": 1e-4, "gradient_norm": 0.7, "tokens_per_s": 2e5, "step_s": 2.0, "data_wait_s": 0.5}
SPLIT = {"forward_backward_s": 0.75, "communication_s": 0.5, "update_s": 0.25}
STEP |= {"proportions": {"wiki": 0.25, "code": 0.75}, "drawn": {"wiki": 50, "code": 0}, "divergence": 0.3}
GROUP = {"expected": 0.2, "target": 0.25, "undecided": 7, "size": 8}
STEP |= {"sparsity": {"head": GROUP, "hidden": GROUP | {"target": None}}}
EVALUATION = {"kind": "evaluation", "step": 3, "time": 109.0, "losses": {"wiki": 2.0, "code": 1.0}, "version": 1}
EVALUATION |= {"references": {"wiki": 1.5, "code": 1.25}, "proportions": {"wiki": 0.5, "code": 0.5}}
EVALUATION |= {"seconds": 1.5, "mixture_wait_s": 0.5}
CHECKPOINT = {"kind": "checkpoint", "step": 3, "time": 111.0, "name": "step-3", "seconds": 4.0}
RESUMED = {"kind": "event", "step": 0, "time": 99.0, "event": "resumed", "text": "goes on"}
UNSPLIT = STEP
STEP = UNSPLIT | SPLIT
ROWS = [START, RESUMED, STEP, EVALUATION, CHECKPOINT]
STEP_PARTS = {("forward_backward",): 0.75, ("communication",): 0.5, ("update",): 0.25}


def seen(*rows):
    figures = Figures()
    for row in rows:
        figures.see(row)
    return figures


def values(figures, name):
    return {tuple(value for _, value in labels): v for (key, labels), v in figures.values.items() if key == name}


class TestFigures:
    def test_every_metric_of_the_table_has_a_value_and_no_other(self):
        # catches a name that is promised to dashboards and alerts and never set, and one that Ray was not told of
        figures = seen(*ROWS)
        assert {name for name, _ in figures.values} == {metric.name for metric in METRICS}
        labels = {metric.name: metric.labels for metric in METRICS}
        assert all(tuple(key for key, _ in pairs) == labels[name] for name, pairs in figures.values)

    def test_values(self):
        figures = seen(*ROWS)
        assert values(figures, "shear_excess_loss_nats_per_token") == {("wiki",): 0.5, ("code",): 0.0}
        assert values(figures, "shear_proportion") == {("wiki",): 0.5, ("code",): 0.5}, "those that hold from here"
        assert values(figures, "shear_epochs") == {("wiki",): 1.25}, "a domain without text has no epochs"
        assert values(figures, "shear_target_sparsity") == {("head",): 0.25}
        assert values(figures, "shear_tokens_per_second_per_worker") == {(): 5e4}
        # 2e5 tokens/s of 6e9 FLOPs over four devices of 1e15 a second
        assert math.isclose(values(figures, "shear_model_flops_utilization")[()], 0.3)
        parts = {("data",): 0.5, **STEP_PARTS, ("evaluation",): 1.0, ("mixture",): 0.5, ("checkpoint",): 4.0}
        assert values(figures, "shear_part_seconds") == parts
        assert values(figures, "shear_spent_seconds") == parts
        assert values(figures, "shear_last_row_unix_seconds") == {(): 111.0}

    def test_sums_and_counts_go_on(self):
        # catches a sum that a row replaces, and restarts that a start row forgets
        figures = seen(*ROWS, RESUMED, START, STEP)
        assert values(figures, "shear_spent_seconds")["communication",] == 1.0
        assert values(figures, "shear_restarts") == {(): 2.0}

    def test_steps_that_were_not_split(self):
        # catches logs of earlier releases that cannot be recalled, and a GPU's sample that stands for one step only
        figures = seen(START, UNSPLIT)
        whole = {("data",): 0.5, ("compute",): 1.5}
        assert values(figures, "shear_part_seconds") == values(figures, "shear_spent_seconds") == whole
        for row in (STEP, UNSPLIT | {"step_s": 3.5}):
            figures.see(row)
        assert values(figures, "shear_part_seconds") == {("data",): 0.5} | STEP_PARTS, "those of the sample"
        spent = {part: 3 * seconds for part, seconds in STEP_PARTS.items()}  # 1.5 s in the sample, 3.0 after it
        assert values(figures, "shear_spent_seconds") == {("data",): 1.5, ("compute",): 1.5} | spent
        figures.see(START)  # other workers: their first steps have not been split either
        figures.see(UNSPLIT)
        assert values(figures, "shear_spent_seconds")["compute",] == 3.0

    def test_a_device_without_a_known_peak_has_no_utilization(self):
        # catches an MFU that is made up
        figures = seen(START | {"peak_flops_per_s": None}, STEP)
        assert values(figures, "shear_model_flops_utilization") == {}

    def test_losses_that_are_no_number(self):
        # catches an alert that one good step puts out while a domain is still lost
        lost = EVALUATION | {"losses": {"wiki": math.nan, "code": math.inf}}
        assert values(seen(START, STEP, lost, STEP), "shear_not_finite_losses") == {(): 2.0}
        assert values(seen(START, STEP, lost, STEP, EVALUATION), "shear_not_finite_losses") == {(): 0.0}

    def test_only_what_a_row_says_has_changed(self):
        # catches a tracker that writes an evaluation's losses again at every step
        figures = seen(START, EVALUATION, STEP)
        assert "shear_loss_nats_per_token" not in {name for name, _ in figures.changed}
        assert "shear_loss_nats_per_token" in {name for name, _ in figures.values}

    def test_rows_of_a_real_run(self, finished_journey):
        # catches a row kind or key that the loop writes and nobody here knows
        journey, done = finished_journey
        assert done.returncode == 0, done.stderr
        for phase in ("source", "pruning", "recovery"):
            figures = seen(*journey.rows(phase))
            missing = {metric.name for metric in METRICS} - {name for name, _ in figures.values}
            gates = (
                {"shear_sparsity", "shear_target_sparsity", "shear_undecided_gates"} if phase != "pruning" else set()
            )
            references = {f"shear_{kind}_loss_nats_per_token" for kind in ("reference", "excess")}
            elsewhere = {"shear_divergence_nats_per_token", "shear_model_flops_utilization"}
            assert missing == gates | elsewhere | (references if phase == "source" else set())
            assert values(figures, "shear_step") == values(figures, "shear_checkpoint_step")
            assert values(figures, "shear_workers") == {(): 2.0}


class RecordedGauge:
    """Stands where Ray's own stands, in a process without Ray."""

    made: ClassVar[dict] = {}

    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.set_to = tag_keys, {}
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name), "Ray refuses other names"
        self.made[name] = self

    def set(self, value, tags):
        assert set(tags) == set(self.tag_keys), "Ray refuses labels that are missing or were not declared"
        self.set_to[tuple(sorted(tags.items()))] = value


def test_all_figures_reach_ray_again_and_again(monkeypatch):
    """Ray drops a gauge that was not set for half a minute; and no secret of a workspace's URI may become a label."""
    monkeypatch.setattr("ray.util.metrics.Gauge", RecordedGauge)
    monkeypatch.setattr(metrics, "EXPORT_EVERY_S", 3600.0)
    shown = RunMetrics("memory://user:secret@bucket/run?key=secret", "pruning")
    for row in ROWS:
        shown.see(row)
    for _ in range(2):
        shown.export()
        gauges = RecordedGauge.made
        assert {name for name, gauge in gauges.items() if gauge.set_to} == {metric.name for metric in METRICS}
        assert "//bucket/run" in str([gauge.set_to for gauge in gauges.values()])
        assert "secret" not in str([gauge.set_to for gauge in gauges.values()])
        for gauge in gauges.values():
            gauge.set_to.clear()


def test_ages_are_counted_from_the_drivers_beginning_on(monkeypatch):
    """Catches alerts on every run that goes on in the morning, and none on one whose workers never come."""
    monkeypatch.setattr("ray.util.metrics.Gauge", RecordedGauge)
    monkeypatch.setattr(metrics, "EXPORT_EVERY_S", 3600.0)
    began = time.time()

    def shown_ages():
        shown.export()
        return [value for name in metrics.AGES for value in RecordedGauge.made[name].set_to.values()]

    shown = RunMetrics("/runs/x", "recovery")
    assert shown_ages() == [shown.began_unix_s]
    assert began <= shown.began_unix_s <= time.time()
    for row in ROWS:
        shown.recall(row)
    assert shown_ages() == [shown.began_unix_s] * 2
    for row in ROWS:
        shown.see(row | {"time": shown.began_unix_s + 60})
    assert shown_ages() == [shown.began_unix_s + 60] * 2


def test_the_documents_table_is_the_codes():
    """A dashboard is written from docs/METRICS.md."""
    text = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(shear_\w+)` \| (.+?) \| (.*?) ?\| (.+) \|$", text, flags=re.MULTILINE)
    told = [(name, unit, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, unit, labels, meaning in rows]
    assert told == [(metric.name, metric.unit, metric.labels, metric.meaning) for metric in METRICS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["kind"])
def test_rows_are_json(row):
    """The rows that these tests are made of could be a log's."""
    assert json.loads(json.dumps(row)) == row
