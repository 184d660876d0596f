"""Tokens a second of the whole path against a bare loop, in one run.

    python benchmarks/orchestration.py [--rounds 5] [--steps 100] [--workers N] [--micro-batch N] [key.sub=value ...]

The whole path is `actors.training.run_phase`: Ray Data streams through the feeder actor, Ray Train, the actor of the
domain weights, the run's log, the driver that follows it. The bare loop is what is left without all of that: as many
processes, the same model, DeepSpeed engine, batches and learning rates, tokens in memory before it begins, and no Ray
anywhere on the machine. Shape, batch and workers are those of the quickstart's source model; any key of its recipe
can be set, as in `source.train.shape.hidden_size=256`. The text is what the installation holds, prepared at the start.

The two take turns, in turned order every second round. Timed are the steps after the first few, with all that lies
between two of them; an evaluation or a checkpoint is the method's own and is left out, what each takes is said below
the table. `steps` is tokens over time, and so holds every stall; `middle` is the median step. Both sides train on the
same sequences in the same order, and the last column shows it.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.training import run_phase
from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe
from shearing.data.config import MixtureConfig
from shearing.data.manifest import TOKENIZER_FOLDER, load_manifest
from shearing.data.mixing import MixState
from shearing.data.parquet_source import ParquetSource
from shearing.data.preparation import prepare_in_process
from shearing.data.source import make_orders
from shearing.data.tokenizer_training import ensure_trained_tokenizer
from shearing.models.family import llama_config
from shearing.models.loading import new_model, read_config, write_json
from shearing.storage import open_store
from shearing.training.batches import BatchStream
from shearing.training.config import TrainingConfig
from shearing.training.engine import DTYPES, Engine, deepspeed_config, prepare_deepspeed
from shearing.training.loop import sequence_losses
from shearing.training.phase import PhaseConfig
from shearing.training.schedule import learning_rate

QUICKSTART = Path(__file__).resolve().parents[1] / "pipelines" / "recipes" / "quickstart.yaml"
GOAL = 0.95
RAY_NICENESS = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112
"""Ray lowers the priority of its workers; on one side alone, that would charge it for what else runs here."""


@dataclass
class Side:
    """One run of one side: seconds of its timed steps, and of what was left out between them."""

    steps_s: list[float]
    loss: float
    evaluations_s: float = 0.0
    checkpoints_s: float = 0.0
    data_wait_s: float = 0.0

    def tokens_per_s(self, batch_tokens: int) -> float:
        return batch_tokens * len(self.steps_s) / sum(self.steps_s)


def make_phase(recipe: Recipe, folder: Path, options: argparse.Namespace) -> PhaseConfig:
    """The quickstart's source phase on a corpus of its own, with the evaluations and checkpoints of its recovery."""
    train = recipe.source.train
    assert train is not None, "source.model cannot be set here: the model is made from source.train"
    # in this process: no Ray has run when the bare loop begins
    tokenizer_dir = ensure_trained_tokenizer(recipe.corpus, train.tokenizer)
    corpus, manifest = prepare_in_process(recipe.corpus, tokenizer_dir)
    config = llama_config(train.shape, manifest.tokenizer.vocab_size, 2 * manifest.sequence_tokens)
    model = folder / "model"
    model.mkdir()
    write_json(model / "config.json", config)
    training = TrainingConfig.model_validate(
        train.model_dump(include=set(TrainingConfig.model_fields))
        | {"steps": options.steps, "warmup_steps": min(train.warmup_steps, options.steps - 1)}
        | recipe.recovery.model_dump(include={"evaluate_every_steps", "checkpoint_every_steps"})
    )
    assert (corpus.child(TOKENIZER_FOLDER)).exists("tokenizer.json")
    return PhaseConfig(
        name="source",
        model=str(model),
        fresh=True,
        training=training,
        engine=recipe.engine,
        evaluation=recipe.evaluation,
        corpus=corpus.uri,
        split="train",
        proportions={name: domain.proportion for name, domain in recipe.corpus.domains.items()},
        mixture=MixtureConfig(rule="static"),  # proportions that follow losses would be known only as they come
        references=dict.fromkeys(recipe.corpus.domains, 0.0),
        seed=recipe.seed,
    )


def whole_path(recipe: Recipe, phase: PhaseConfig, folder: str, skipped: int) -> Side:
    """One phase as a run has it, in Ray started for it."""
    rows: list[dict[str, Any]] = []
    with RaySession(recipe) as session:
        session.start(Console(sys.stderr))
        try:
            run_phase(phase, folder, rows.append)
        except Exception as error:  # Ray's own do not travel between processes
            raise RuntimeError(str(error)) from None
    return read_rows(rows, phase.training.checkpoint_every_steps, skipped)


def read_rows(rows: list[dict[str, Any]], checkpoint_every: int, skipped: int) -> Side:
    """Split the time between the log's rows into steps, evaluations and checkpoints.

    A row's time is when it was made; a checkpoint has no row, it lies before the step after it.
    """
    side = Side([], [row["loss"] for row in rows if row["kind"] == "step"][-1])
    waits = []
    for before, row in itertools.pairwise(rows):
        seconds = row["time"] - before["time"]
        if row["kind"] == "evaluation":
            side.evaluations_s += seconds
        elif row["kind"] == "step":
            if before["step"] and before["step"] % checkpoint_every == 0:
                side.checkpoints_s += seconds - row["step_s"]
                seconds = row["step_s"]
            if row["step"] > skipped:
                side.steps_s.append(seconds)
                waits.append(row["data_wait_s"])
    side.data_wait_s = sum(waits)
    return side


def bare_loop(phase: PhaseConfig, rendezvous: str, rank: int, skipped: int) -> Side:
    """The same training on one of several processes, with nothing around it."""
    os.nice(RAY_NICENESS)
    world, engine_config = phase.engine.most_workers, phase.engine
    torch.set_num_threads(max(1, int(engine_config.cpus_per_worker)))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    device = prepare_deepspeed()
    batches = held_batches(phase, rank, world)
    micro = engine_config.micro_batch_sequences
    torch.manual_seed(phase.seed)
    model = new_model(read_config(Path(phase.model)), DTYPES[engine_config.dtype], phase.seed)
    config = deepspeed_config(phase.training, engine_config, len(batches[0]) // micro)
    engine = Engine(model, phase.training, config, device)
    engine.model.train()
    stamps_s = [time.perf_counter()]
    for step, batch_NT in enumerate(batches):
        engine.begin_update(learning_rate(phase.training, step))
        losses = []
        for tokens_BT in batch_NT.split(micro):
            loss = sequence_losses(engine.logits(tokens_BT), tokens_BT).mean()
            engine.accumulate(loss)
            losses.append(loss.detach())
        stamps_s.append(time.perf_counter())
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    dist.destroy_process_group()
    seconds = [after - before for before, after in itertools.pairwise(stamps_s)]
    return Side(seconds[skipped:], float(mean) / world)


def held_batches(phase: PhaseConfig, rank: int, world: int) -> list[torch.Tensor]:
    """This rank's share of every batch of the phase, int64 [N, T] each."""
    store = open_store(phase.corpus)
    manifest = load_manifest(store)
    domains = list(phase.proportions)
    splits = {domain: manifest.domains[domain][phase.split] for domain in domains}
    source = ParquetSource(store, make_orders(manifest, phase.split, domains, phase.seed))
    sequences = phase.training.global_batch_tokens // manifest.sequence_tokens
    stream = BatchStream(source, splits, sequences, seed=phase.seed, rank=rank, world=world)
    mix, batches = MixState.start(domains), []
    for step in range(phase.training.steps):
        batch = stream.next(step, mix, phase.proportions)
        mix = batch.mix
        batches.append(batch.tokens_NT)
    return batches


def in_processes(calls: list[tuple[Any, ...]], function: Callable[..., Side]) -> list[Side]:
    """Each call in a fresh process of its own, all at once."""
    with ProcessPoolExecutor(len(calls), mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]


def measure(recipe: Recipe, phase: PhaseConfig, folder: Path, options: argparse.Namespace) -> dict[str, list[Side]]:
    def whole(number: int) -> Side:
        return in_processes([(recipe, phase, str(folder / f"run-{number}"), options.skip)], whole_path)[0]

    def bare(number: int) -> Side:
        meeting = str(folder / f"rendezvous-{number}")
        ranks = range(phase.engine.most_workers)
        return in_processes([(phase, meeting, rank, options.skip) for rank in ranks], bare_loop)[0]

    sides: dict[str, list[Side]] = {"bare loop": [], "whole path": []}
    run = {"bare loop": bare, "whole path": whole}
    print(f"{'':5}  {'':10}  {'tokens/s':^20}  {'/ bare loop':^14}")
    print(f"{'round':>5}  {'side':10}  {'steps':>9}  {'middle':>9}  {'steps':>6}  {'middle':>6}  {'last loss':>10}")
    for number in range(options.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            sides[name].append(run[name](number))
        print_round(number, sides, phase.training.global_batch_tokens)
    return sides


def print_round(number: int, sides: dict[str, list[Side]], batch_tokens: int) -> None:
    for name, runs in sides.items():
        side, bare = runs[-1], sides["bare loop"][-1]
        middle = statistics.median(side.steps_s)
        ratio, middle_ratio = sum(bare.steps_s) / sum(side.steps_s), statistics.median(bare.steps_s) / middle
        print(
            f"{number + 1:5}  {name:10}  {side.tokens_per_s(batch_tokens):9,.0f}  {batch_tokens / middle:9,.0f}"
            f"  {ratio:6.3f}  {middle_ratio:6.3f}  {side.loss:10.6f}",
            flush=True,
        )


def summary(sides: dict[str, list[Side]]) -> str:
    pairs = list(zip(sides["bare loop"], sides["whole path"], strict=True))
    lines = []
    for name, of in (("tokens/s", sum), ("middle step", statistics.median)):
        ratios = sorted(of(bare.steps_s) / of(whole.steps_s) for bare, whole in pairs)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        lines.append(f"whole path / bare loop, {name}: {statistics.median(ratios):.3f} ({spread}); goal {GOAL:.2f}")
    waited = [whole.data_wait_s / sum(whole.steps_s) for _, whole in pairs]
    lines.append(f"of the whole path's steps, waiting for data: {100 * statistics.median(waited):.2f} %")
    for name in ("evaluations", "checkpoints"):
        shares = []
        for _, whole in pairs:
            spent = getattr(whole, f"{name}_s")
            shares.append(spent / (sum(whole.steps_s) + whole.evaluations_s + whole.checkpoints_s))
        lines.append(f"beside the steps, {name} took {100 * statistics.median(shares):.1f} % of the phase's time")
    apart = max(abs(bare.loss - whole.loss) for bare, whole in pairs)
    lines.append(f"last training losses of the two sides are at most {apart:.1g} nats a token apart")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the quickstart's recipe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=10, help="first steps that are not timed")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--micro-batch", type=int, default=None, help="sequences of one forward pass on one worker")
    parser.add_argument("--megabytes", type=float, default=1.0, help="text of each domain")
    options = parser.parse_intermixed_args(arguments)
    if not options.skip < options.steps:
        parser.error(f"--skip = {options.skip} leaves no step of --steps = {options.steps}")
    return options


def little_text(folder: Path, megabytes: float) -> list[str]:
    """Overrides of the quickstart: so much text of each domain, prepared in this folder."""
    domains = load_recipe(str(QUICKSTART), []).corpus.domains
    texts = [f"corpus.domains.{domain}.text=installed:{domain}?megabytes={megabytes}" for domain in domains]
    return [f"corpus.path={folder}/corpora", *texts]


def main() -> None:
    options = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ray keeps its sockets below a folder of its own; only corpus and runs lie here
    with tempfile.TemporaryDirectory(prefix="shear-benchmark-") as name:
        folder = Path(name)
        texts = little_text(folder, options.megabytes)
        engine = {"engine.workers": options.workers, "engine.micro_batch_sequences": options.micro_batch}
        texts += [f"{key}={value}" for key, value in engine.items() if value is not None]
        recipe = load_recipe(str(QUICKSTART), texts + options.overrides)
        phase = make_phase(recipe, folder, options)
        print(
            f"{phase.engine.most_workers} workers x {max(1, int(phase.engine.cpus_per_worker))} threads on "
            f"{os.cpu_count()} cores, ZeRO {phase.engine.zero_stage}, {phase.engine.dtype}; "
            f"{phase.training.global_batch_tokens:,} tokens a step; {options.steps} steps, {options.skip} not timed"
        )
        print(summary(measure(recipe, phase, folder, options)))


if __name__ == "__main__":
    main()
