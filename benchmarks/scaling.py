"""What more workers bring on this machine, and what one actor bears for many clients.

    python benchmarks/scaling.py workers [--workers 1 2 4] [--steps 30] [--batch-sequences 32] [key.sub=value ...]
    python benchmarks/scaling.py actor [--clients 8 64 512] [--rounds 20] [--sequences 4]
    python benchmarks/scaling.py paper

`workers` trains the quickstart's shape by DeepSpeed without Ray, in as many processes as there are workers, the cores
divided between them. Strong: one global batch for all numbers of workers; weak: a batch that grows with them. Each row
says which share of the first row's speed a core it reached; more workers than cores share them, and the table says so.

`actor` starts the real domain-weight actor and the real feeder in Ray, and clients that train nothing: each submits its
losses at every update, hears the new proportions from it, and fetches its sequences. A client is a thread of one of a
few processes, for 512 processes of Python do not fit a small machine: messages and bytes are those of 512 workers, the
time that the senders need is on the same cores. Latencies are of one call; CPU seconds of the actors' own processes.

`paper` prints the tables of docs/SCALING.md. Figures of the first two hold only where nothing else runs.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import torch.distributed as dist
from orchestration import in_processes
from streams import PROPORTIONS, SEED, write_shards

from actors.domain_weights import DomainWeightsClient, start_domain_weights
from actors.feeder import FeedPlan, RayDataSource, start_feeder
from orchestrator.recipe_loading import load_recipe
from orchestrator.scaling_tables import tables
from shearing.data.config import MixtureConfig
from shearing.data.mixing import Draw
from shearing.models.family import llama_config
from shearing.models.loading import new_model
from shearing.training.config import EngineConfig, TrainingConfig
from shearing.training.engine import DTYPES, Engine, deepspeed_config, prepare_deepspeed
from shearing.training.loop import sequence_losses

QUICKSTART = Path(__file__).resolve().parents[1] / "pipelines" / "recipes" / "quickstart.yaml"
CORES = len(os.sched_getaffinity(0))
CLIENT_PROCESSES = 8
SHARD_SEQUENCES, SHARD_TOKENS = 1024, 256
UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Case:
    """One number of workers; plain values, for processes of their own."""

    config: dict[str, Any]
    training: TrainingConfig
    engine: EngineConfig
    sequence_tokens: int
    workers: int

    @property
    def threads(self) -> int:
        return max(1, CORES // self.workers)

    @property
    def cores(self) -> int:
        """Cores that the workers hold together."""
        return min(CORES, self.workers * self.threads)


def train(case: Case, rendezvous: str, rank: int) -> list[float]:
    """Seconds of each timed step of one worker."""
    torch.set_num_threads(case.threads)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=case.workers)
    device = prepare_deepspeed()
    micro = case.engine.micro_batch_sequences
    share = case.training.global_batch_tokens // case.sequence_tokens // case.workers
    engine = Engine(
        new_model(case.config, DTYPES[case.engine.dtype], SEED),
        case.training,
        deepspeed_config(case.training, case.engine, share // micro),
        device,
    )
    engine.model.train()
    draw = torch.Generator().manual_seed(rank)
    size = (share, case.sequence_tokens)
    seconds = []
    for _ in range(case.training.steps + UNTIMED_STEPS):
        began = time.perf_counter()
        engine.begin_update(case.training.learning_rate)
        for tokens_BT in torch.randint(case.config["vocab_size"], size, generator=draw).split(micro):
            engine.accumulate(sequence_losses(engine.logits(tokens_BT), tokens_BT).mean())
        seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return seconds[UNTIMED_STEPS:]


def measure_workers(options: argparse.Namespace) -> None:
    recipe = load_recipe(str(QUICKSTART), options.overrides)
    source, tokens = recipe.source.train, recipe.corpus.sequence_tokens
    assert source is not None
    config = llama_config(source.shape, source.tokenizer.vocab_size, 2 * tokens)
    print(f"{CORES} cores; {recipe.engine.dtype}, ZeRO {recipe.engine.zero_stage}, sequences of {tokens} tokens")
    print(
        f"{'':6}  {'workers':>7}  {'threads':>7}  {'batch':>6}  {'step ms':>8}  {'tokens/s':>9}  {'a core':>8}  share"
    )
    for kind in ("strong", "weak"):
        first = None
        for workers in options.workers:
            sequences = (
                options.batch_sequences * workers // options.workers[0] if kind == "weak" else options.batch_sequences
            )
            per_pass = min(recipe.engine.micro_batch_sequences, sequences // workers)
            engine = recipe.engine.model_copy(update={"micro_batch_sequences": per_pass})
            training = TrainingConfig(steps=options.steps, global_batch_tokens=sequences * tokens)
            case = Case(config, training, engine, tokens, workers)
            with tempfile.TemporaryDirectory() as folder:
                calls = [(case, f"{folder}/meet", rank) for rank in range(workers)]
                step_s = statistics.median(in_processes(calls, train)[0])
            speed = sequences * tokens / step_s
            first = first or speed / case.cores
            shared = "" if workers <= CORES else f"  ({workers} workers share {CORES} cores)"
            print(
                f"{kind:6}  {workers:7}  {case.threads:7}  {sequences:6}  {1e3 * step_s:8.1f}  {speed:9,.0f}  "
                f"{speed / case.cores:8,.0f}  {speed / case.cores / first:8.3f}{shared}",
                flush=True,
            )


@ray.remote(num_cpus=0)
class Clients:
    """Some of the simulated workers, a thread each."""

    def __init__(self, ranks: list[int], world: int, weights: Any, feeder: Any) -> None:
        self.clients = [DomainWeightsClient(weights, rank, world, "benchmark") for rank in ranks]
        self.source = RayDataSource(feeder)
        self.pool = ThreadPoolExecutor(len(ranks))

    def submit(self, step: int, base: Any) -> tuple[list[float], Any]:
        """Every client hands in its share; seconds of each, and the version that all got."""

        def one(client: DomainWeightsClient) -> tuple[float, Any]:
            sums = dict.fromkeys(PROPORTIONS, (3.0 + 0.01 * step + 0.001 * client.rank, 1))
            began = time.perf_counter()
            state = client.submit(step, base, sums)
            return time.perf_counter() - began, state

        done = list(self.pool.map(one, self.clients))
        versions = {state.version for _, state in done}
        assert len(versions) == 1, versions
        return [seconds for seconds, _ in done], done[0][1]

    def fetch(self, number: int, sequences: int) -> list[float]:
        """Every client fetches its share of batch `number`; seconds of each."""

        def one(client: DomainWeightsClient) -> float:
            domains = list(PROPORTIONS)
            first = (number * client.world + client.rank) * sequences
            draws = [Draw(domains[i % len(domains)], i // len(domains)) for i in range(first, first + sequences)]
            began = time.perf_counter()
            tokens = self.source.fetch(draws).tokens_NT
            assert tokens.shape == (sequences, SHARD_TOKENS)
            return time.perf_counter() - began

        return list(self.pool.map(one, self.clients))


def cpu_seconds(actors: list[Any]) -> list[float]:
    """Of the actors' own processes so far."""
    pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in actors]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return [spent.user + spent.system for spent in times]


def line(world: int, what: str, latencies: list[float], rounds_s: list[float], cpu_s: float, extra: str) -> str:
    """One row; percentiles over all calls, the round's time the median."""
    middle, high, worst = np.percentile(latencies, [50, 99, 100]) * 1e3
    return (
        f"{world:7}  {what:12}  {middle:8.1f}  {high:8.1f}  {worst:8.1f}  {1e3 * statistics.median(rounds_s):9.1f}  "
        f"{1e3 * cpu_s / len(latencies):11.3f}  {extra}"
    )


def measure_clients(world: int, folder: str, options: argparse.Namespace) -> None:
    config, prior = MixtureConfig(rule="sheared"), PROPORTIONS
    weights = start_domain_weights(f"weights-{world}", f"{folder}/{world}", config, prior, dict.fromkeys(prior, 2.0))
    last = (options.rounds + 1) * world * options.sequences // len(prior) + 1
    feeder = start_feeder(FeedPlan(folder, "train", SEED, dict.fromkeys(prior, 0), dict.fromkeys(prior, last)))
    processes = min(CLIENT_PROCESSES, world)
    groups = [
        Clients.remote(  # type: ignore[attr-defined]
            list(range(world))[n::processes], world, weights, feeder
        )
        for n in range(processes)
    ]
    state = ray.get(weights.state.remote())
    _, state = ray.get([group.submit.remote(0, state) for group in groups])[0]  # everything started
    ray.get([group.fetch.remote(0, options.sequences) for group in groups])
    found: dict[str, list[list[float]]] = {"submit": [], "fetch": []}
    rounds_s: dict[str, list[float]] = {"submit": [], "fetch": []}
    cpu = cpu_seconds([weights, feeder])
    for number in range(1, options.rounds + 1):
        began = time.perf_counter()
        answers = ray.get([group.submit.remote(number, state) for group in groups])
        rounds_s["submit"].append(time.perf_counter() - began)
        assert {other.version for _, other in answers} == {state.version + 1}
        state = answers[0][1]
        found["submit"] += [seconds for seconds, _ in answers]
        began = time.perf_counter()
        found["fetch"] += ray.get([group.fetch.remote(number, options.sequences) for group in groups])
        rounds_s["fetch"].append(time.perf_counter() - began)
    spent = [after - before for before, after in zip(cpu, cpu_seconds([weights, feeder]), strict=True)]
    served = world * options.sequences * SHARD_TOKENS / statistics.median(rounds_s["fetch"])
    for (what, groups_s), cpu_s, extra in zip(found.items(), spent, ("", f"{served:,.0f} tokens/s"), strict=True):
        print(line(world, what, [s for group in groups_s for s in group], rounds_s[what], cpu_s, extra), flush=True)
    for actor in (*groups, weights, feeder):
        ray.kill(actor)


def measure_actor(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="shear-benchmark-") as folder:
        write_shards(Path(folder), SHARD_SEQUENCES, SHARD_TOKENS)
        ray.init(address="local", num_cpus=options.ray_cpus, include_dashboard=False, log_to_driver=False)
        print(
            f"{CORES} cores; {len(PROPORTIONS)} domains; {options.sequences} sequences of {SHARD_TOKENS} tokens a"
            f" fetch; {options.rounds} rounds; submit: losses in, proportions back, to all clients"
        )
        print(
            f"{'clients':>7}  {'call':12}  {'p50 ms':>8}  {'p99 ms':>8}  {'worst ms':>8}  {'round ms':>9}"
            f"  {'CPU ms/call':>11}"
        )
        for world in options.clients:
            measure_clients(world, folder, options)
        ray.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    workers = kinds.add_parser("workers")
    workers.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the quickstart's recipe")
    workers.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    workers.add_argument("--steps", type=int, default=30)
    workers.add_argument("--batch-sequences", type=int, default=32, help="of the first number of workers")
    actor = kinds.add_parser("actor")
    actor.add_argument("--clients", type=int, nargs="+", default=[8, 64, 512])
    actor.add_argument("--rounds", type=int, default=20)
    actor.add_argument("--sequences", type=int, default=4, help="that each client fetches")
    actor.add_argument("--ray-cpus", type=int, default=None)
    kinds.add_parser("paper")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.kind == "workers":
        measure_workers(options)
    elif options.kind == "actor":
        measure_actor(options)
    else:
        for name, table in tables().items():
            print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
