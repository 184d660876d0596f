"""What it costs to split the steps of a training phase into their parts, and what the parts are.

    python benchmarks/step_parts.py [--stages 1 3] [--pairs 100] [key.sub=value ...]

Trains the quickstart's source model (any key of its recipe can be set) without Ray, in as many processes as the recipe
has workers: the real loop on real text. Of every two steps one is split and one is not, in an order that is drawn. The
columns: the middle step of each kind; the split one over the other, with the 95 % interval that drawing the pairs again
gives; how many collectives a step waits for; what timing them takes, by 100,000 waits for nothing, as a share of the
step; and the parts as shares of the first worker's steps. On CPU only: on a GPU few steps are split.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from orchestration import QUICKSTART, in_processes, little_text, make_phase

from orchestrator.recipe_loading import load_recipe
from shearing.data.manifest import load_manifest
from shearing.data.mixture import MixtureState
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import make_orders
from shearing.evaluation.losses import LossSums
from shearing.storage import open_store
from shearing.training import step_clock
from shearing.training.engine import prepare_deepspeed
from shearing.training.loop import Report, training_reports
from shearing.training.phase import PhaseConfig, Place, build_trainer
from shearing.training.step_clock import BlockedWaits, Span

UNTIMED_STEPS = 6
CALLS = 100_000
PARTS = ("data_wait_s", "forward_backward_s", "communication_s", "update_s")


@dataclass
class Split:
    """What one worker saw: its rows, how many waits a step had, and seconds that timing one of them takes."""

    rows: list[Report]
    waits: float
    timing_s: float


class Unwatched:
    """Splits no step."""

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def end(self, step_s: float) -> list[Span] | None:  # noqa: ARG002
        return None


class Unmoved:
    """Proportions that stay."""

    def submit(self, step: int, base: MixtureState, sums: LossSums) -> MixtureState:  # noqa: ARG002
        return base


def train(phase: PhaseConfig, rendezvous: str, rank: int) -> Split:
    """The phase on one of several processes, every other step split."""
    world = phase.engine.most_workers
    torch.set_num_threads(max(1, int(phase.engine.cpus_per_worker)))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    place = Place(rank, world, prepare_deepspeed())
    store = open_store(phase.corpus)
    source = ParquetSource(store, make_orders(load_manifest(store), phase.split, list(phase.proportions), phase.seed))
    trainer = build_trainer(phase, place, source, Unmoved())
    coin = random.Random(phase.seed)  # the same on all ranks
    order = [kind for _ in range(phase.training.steps) for kind in coin.sample((True, False), 2)]
    watched, unwatched, counts, rows = BlockedWaits(), Unwatched(), [], []
    trainer.clock.waits = watched if order[0] else unwatched
    for report in training_reports(trainer):
        if report["kind"] == "step":
            rows.append(report)
            counts += [len(watched.spans)] * ("communication_s" in report)
            trainer.clock.waits = watched if order[report["step"]] else unwatched
    dist.destroy_process_group()
    return Split(rows[UNTIMED_STEPS:], statistics.mean(counts), timing_s())


def timing_s() -> float:
    """Seconds that timing one wait takes."""
    waits, real = BlockedWaits(), step_clock.WAIT
    step_clock.WAIT = lambda _: True
    try:
        waits.begin()
        began = time.perf_counter()
        for _ in range(CALLS):
            dist.Work.wait(None)
        return (time.perf_counter() - began) / CALLS
    finally:
        step_clock.WAIT = real
        waits.end(1.0)


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The 95 % interval of the ratio of middle steps, by 1,000 samples of the pairs."""
    draw, ratios = random.Random(0), []
    for _ in range(1000):
        split, whole = zip(*draw.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(split) / statistics.median(whole))
    ratios.sort()
    return ratios[25], ratios[974]


def print_stage(stage: int, found: Split) -> None:
    steps = [(row["step_s"], "communication_s" in row) for row in found.rows]
    pairs = []
    for (one_s, split), (other_s, _) in zip(steps[::2], steps[1::2], strict=True):
        pairs.append((one_s, other_s) if split else (other_s, one_s))
    split_s, whole_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, high = interval(pairs)
    rows = [row for row in found.rows if "communication_s" in row]
    total = sum(row["step_s"] for row in rows)
    shares = "  ".join(f"{100 * sum(row[part] for row in rows) / total:6.2f} %" for part in PARTS)
    cost = found.waits * found.timing_s / whole_s
    print(
        f"{stage:5}  {1e3 * split_s:9.2f}  {1e3 * whole_s:9.2f}  {split_s / whole_s:6.4f} ({low:.4f} to {high:.4f})"
        f"  {found.waits:6.1f}  {100 * cost:8.4f} %  {shares}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the quickstart's recipe")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--pairs", type=int, default=100, help="of a step that is split and one that is not")
    parser.add_argument("--megabytes", type=float, default=1.0, help="text of each domain")
    options = parser.parse_intermixed_args()
    options.steps = 2 * options.pairs + UNTIMED_STEPS
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="shear-benchmark-") as name:
        folder = Path(name)
        recipe = load_recipe(str(QUICKSTART), little_text(folder, options.megabytes) + options.overrides)
        phase = make_phase(recipe, folder, options)
        print(
            f"{'stage':>5}  {'split ms':>9}  {'whole ms':>9}  {'split / whole':^26}  {'waits':>6}  {'timing':>10}  "
            f"{'data':>8}  {'passes':>8}  {'commun.':>8}  {'update':>8}"
        )
        for stage in options.stages:
            engine = phase.engine.model_copy(update={"zero_stage": stage})
            ranks = range(engine.most_workers)
            staged = phase.model_copy(update={"engine": engine})
            calls = [(staged, str(folder / f"meet-{stage}"), rank) for rank in ranks]
            print_stage(stage, in_processes(calls, train)[0])


if __name__ == "__main__":
    main()
