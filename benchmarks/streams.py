"""How much of a step is spent waiting for data, and what feeding costs.

    python benchmarks/streams.py [--rates 200000 20000 0] [--steps 40] [--sequence-tokens 4096] [--batch-tokens 131072]

Three readers on the same shards, in one run: the feeder actor over Ray Data, the Parquet reader in process, and a plain
Parquet cursor in torch's DataLoader with one worker process. The trainer is simulated: it sleeps for as long as its
step would take; rate 0 takes batches as fast as they come. The shards are seven domains of random tokens with the
frequencies of natural text (Zipf), vocabulary 32,000, uint16, zstd.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch.utils.data import DataLoader, IterableDataset

from actors.feeder import FeedPlan, RayDataSource, start_feeder
from shearing.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, SplitEntry, TokenizerEntry, load_manifest
from shearing.data.mixing import Draw, MixState
from shearing.data.parquet_source import ParquetSource, table_tokens
from shearing.data.source import make_orders
from shearing.storage import open_store
from shearing.training.batches import BatchStream

PROPORTIONS = {
    "cc": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "book": 0.045,
    "wiki": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
CHANGED = dict(zip(PROPORTIONS, reversed(PROPORTIONS.values()), strict=True))
UPDATE_EVERY_STEPS = 10
SEED, ROW_GROUP, SHARD_ROW_GROUPS, VOCABULARY = 3, 64, 16, 32_000


@dataclass
class Row:
    reader: str
    rate: float
    open_s: float
    wait_s: float
    longest_wait_s: float
    wall_s: float
    cpu_s: float
    tokens: int

    def line(self, base: "Row") -> str:
        cpu, base_cpu = self.cpu_s / self.tokens * 1e6, base.cpu_s / base.tokens * 1e6
        rate = f"{self.rate:,.0f}" if self.rate else "flat out"
        return (
            f"{self.reader:22} {rate:>9} {self.open_s:7.2f} {100 * self.wait_s / self.wall_s:8.2f}% "
            f"{1e3 * self.longest_wait_s:9.1f} {self.tokens / self.wall_s:12,.0f} {cpu:9.4f} {cpu / base_cpu:7.2f}x"
        )


def write_shards(folder: Path, sequences: int, sequence_tokens: int) -> None:
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    cumulative = np.cumsum(frequency / frequency.sum())
    generator = np.random.default_rng(0)
    domains: dict[str, Any] = {}
    for domain in PROPORTIONS:
        shards, ids = [], itertools.count()
        for number, first in enumerate(range(0, sequences, ROW_GROUP * SHARD_ROW_GROUPS)):
            rows = min(ROW_GROUP * SHARD_ROW_GROUPS, sequences - first)
            tokens = np.searchsorted(cumulative, generator.random(rows * sequence_tokens)).astype(np.uint16)
            path = f"{domain}/train/{number:05d}.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), sequence_tokens)
            table = pa.table({"sequence_id": pa.array(list(itertools.islice(ids, rows))), "tokens": column})
            pq.write_table(table, folder / path, row_group_size=ROW_GROUP, compression="zstd")
            groups = [min(ROW_GROUP, rows - r) for r in range(0, rows, ROW_GROUP)]
            size = (folder / path).stat().st_size
            shards.append(
                ShardEntry(
                    path=path,
                    sequences=rows,
                    first_sequence_id=sum(shard.sequences for shard in shards),
                    row_group_sequences=groups,
                    sha256="",
                    file_bytes=size,
                )
            )
        entry = SplitEntry(
            sequences=sequences, tokens=sequences * sequence_tokens, documents=1, text_bytes=1, shards=shards
        )
        domains[domain] = {"train": entry}
    tokenizer = TokenizerEntry(sha256="", vocab_size=VOCABULARY, boundary_token_id=0)
    manifest = Manifest(
        fingerprint="0" * 64,
        sequence_tokens=sequence_tokens,
        token_dtype="uint16",
        tokenizer=tokenizer,
        domains=domains,
        sources=[],
        malformed=[],
        malformed_lines=0,
        lines=0,
    )
    open_store(str(folder)).write_json(MANIFEST_NAME, manifest.model_dump())


def cpu_seconds() -> dict[int, float]:
    """Of this process and all it started, Ray included, by process."""
    seconds = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def cpu_since(before: dict[int, float]) -> float:
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds().items())


class PlainCursor(IterableDataset):
    """Row groups in file order, a domain drawn for each sequence: what one would write in an hour."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.files = {d: [folder / s.path for s in splits["train"].shards] for d, splits in manifest.domains.items()}

    def rows(self, domain: str) -> Iterator[np.ndarray]:
        while True:
            for path in self.files[domain]:
                file = pq.ParquetFile(path, memory_map=True)
                for group in range(file.num_row_groups):
                    yield from table_tokens(file.read_row_group(group, columns=["tokens"], use_threads=False))

    def __iter__(self) -> Iterator[torch.Tensor]:
        cursors = {d: self.rows(d) for d in PROPORTIONS}
        generator = np.random.default_rng(SEED)
        while True:
            for domain in generator.choice(list(PROPORTIONS), 256, p=list(PROPORTIONS.values())):
                yield torch.from_numpy(next(cursors[domain]).astype(np.int64))


def steps_at(options: argparse.Namespace, rate: float) -> int:
    """Five times as many where no step takes time, and no more than half a minute's where steps are slow."""
    return min(options.steps, max(3, int(30 * rate / options.batch_tokens))) if rate else 5 * options.steps


def train(name: str, batches: Iterator[Any], options: argparse.Namespace, rate: float, open_s: float) -> Row:
    """Take `options.steps` batches, sleeping as a trainer of `rate` tokens/s would compute."""
    step_s = options.batch_tokens / rate if rate else 0.0
    waits, began, cpu = [], time.perf_counter(), cpu_seconds()
    steps = steps_at(options, rate)
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - asked)
        assert batch.shape == (options.batch_tokens // options.sequence_tokens, options.sequence_tokens)
        time.sleep(step_s)
    wall, used = time.perf_counter() - began, cpu_since(cpu)
    tokens = steps * options.batch_tokens
    return Row(name, rate, open_s, sum(waits), max(waits), wall, used, tokens)


def planned(source: Any, manifest: Manifest, options: argparse.Namespace, lag: Counter[str]) -> Iterator[torch.Tensor]:
    """The trainer's own batches: read ahead up to the next update of the proportions."""
    splits = {d: manifest.domains[d]["train"] for d in PROPORTIONS}
    count = options.batch_tokens // options.sequence_tokens
    stream = BatchStream(source, splits, count, seed=SEED, rank=0, world=1)
    mix, proportions = MixState.start(list(PROPORTIONS)), PROPORTIONS
    for step in itertools.count():
        if step and step % UPDATE_EVERY_STEPS == 0:
            proportions = CHANGED if proportions is PROPORTIONS else PROPORTIONS
        batch = stream.next(step, mix, proportions)
        got = Counter(draw.domain for draw in batch.draws)
        lag["batches"] += 1
        lag["off"] += any(abs(got[d] - p * count) >= 2 for d, p in proportions.items())
        mix = batch.mix
        stream.read_ahead(step + 1, mix, proportions, -(step + 1) % UPDATE_EVERY_STEPS)
        yield batch.tokens_NT


def readers(folder: Path, options: argparse.Namespace, rate: float, lag: Counter[str]) -> list[Row]:
    manifest = load_manifest(open_store(str(folder)))
    rows, first_rows = [], [Draw(d, 0) for d in PROPORTIONS]

    began = time.perf_counter()
    per_batch = options.batch_tokens // options.sequence_tokens
    loader = iter(DataLoader(PlainCursor(manifest, folder), batch_size=per_batch, num_workers=1, prefetch_factor=2))
    next(loader)
    rows.append(train("DataLoader cursor", loader, options, rate, time.perf_counter() - began))
    del loader

    began = time.perf_counter()
    source = ParquetSource(open_store(str(folder)), make_orders(manifest, "train", PROPORTIONS, SEED))
    source.fetch(first_rows)
    batches = planned(source, manifest, options, lag)
    next(batches)
    rows.append(train("Parquet, in process", batches, options, rate, time.perf_counter() - began))

    began = time.perf_counter()
    end = dict.fromkeys(PROPORTIONS, (steps_at(options, rate) + UPDATE_EVERY_STEPS + 3) * per_batch)
    feeder = start_feeder(FeedPlan(str(folder), "train", SEED, dict.fromkeys(PROPORTIONS, 0), end))
    RayDataSource(feeder).fetch(first_rows)
    batches = planned(RayDataSource(feeder), manifest, options, lag)
    next(batches)
    rows.append(train("Ray Data feeder", batches, options, rate, time.perf_counter() - began))
    time.sleep(0.5)  # the batch read ahead is still on its way
    ray.kill(feeder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[200_000, 0], help="simulated trainer, tokens/s")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sequence-tokens", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--domain-sequences", type=int, default=2048)
    parser.add_argument("--ray-cpus", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.domain_sequences, options.sequence_tokens)
        began = time.perf_counter()
        ray.init(address="local", num_cpus=options.ray_cpus, include_dashboard=False, log_to_driver=False)
        print(f"ray.init {time.perf_counter() - began:.1f} s", file=sys.stderr)
        time.sleep(3)
        idle = cpu_seconds()
        time.sleep(5)
        idle_per_s = cpu_since(idle) / 5
        lag: Counter[str] = Counter()
        print(
            f"{'reader':22} {'tokens/s':>9} {'open s':>7} {'waiting':>9} {'worst ms':>9} {'tokens/s got':>12} "
            f"{'CPU s/M':>9} {'ratio':>8}"
        )
        for rate in options.rates:
            rows = readers(Path(folder), options, rate, lag)
            for row in rows:
                row.cpu_s -= idle_per_s * row.wall_s  # Ray stands idle beside the other two readers as well
                print(row.line(rows[0]), flush=True)
        print(f"CPU of an idle Ray, taken off each line: {idle_per_s:.3f} s a second")
        print(
            f"{lag['batches']} batches with new proportions every {UPDATE_EVERY_STEPS}: {lag['off']} were off by 2 "
            f"sequences or more in a domain, the first after a change included"
        )
        ray.shutdown()


if __name__ == "__main__":
    main()
