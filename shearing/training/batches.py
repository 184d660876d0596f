"""Global batches as this rank sees them: planned alike on every rank, read one step ahead.

Shapes: N this rank's sequences, T tokens.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from shearing.data.manifest import SplitEntry
from shearing.data.mixing import Draw, MixState, plan_batch, require_unrepeated
from shearing.data.source import Sequences, SequenceSource


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch. `tokens_NT` int64; `wait_s` is how long the rank stood waiting for it."""

    draws: list[Draw]
    tokens_NT: torch.Tensor
    sequence_ids: np.ndarray
    mix: MixState
    wait_s: float

    def micro_batches(self, sequences: int, count: int) -> Iterator[tuple[list[Draw], torch.Tensor]]:
        """`count` pieces of at most `sequences` sequences, in order; the last are smaller, or empty."""
        assert len(self.draws) <= sequences * count
        for start in range(0, sequences * count, sequences):
            yield self.draws[start : start + sequences], self.tokens_NT[start : start + sequences]


@dataclass(frozen=True)
class _Plan:
    step: int
    draws: list[Draw]
    mix: MixState
    reading: "Future[Sequences] | None"


class BatchStream:
    """Turns proportions into batches. Holds no state of its own that a checkpoint would need.

    Args:
        source: Where rows come from; it is told one step ahead where the proportions are settled.
        splits: What each domain holds.
        batch_sequences: Of a global batch.
        seed: Of the order inside batches.
        rank: Of this process; it takes draws `rank`, `rank + world`, ... of each batch.
        world: Number of processes.
        repeats: Whether a domain that runs out starts its next epoch, or stops the run.
    """

    def __init__(
        self,
        source: SequenceSource,
        splits: dict[str, SplitEntry],
        batch_sequences: int,
        *,
        seed: int,
        rank: int,
        world: int,
        repeats: bool = True,
    ) -> None:
        self.source, self.splits, self.batch_sequences = source, splits, batch_sequences
        self.sequences = {domain: split.sequences for domain, split in splits.items()}
        self.seed, self.rank, self.world, self.repeats = seed, rank, world, repeats
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self.ahead: _Plan | None = None

    def read_ahead(self, step: int, mix: MixState, proportions: dict[str, float]) -> None:
        """Begin to read the batch of `step`; only for proportions that can no longer change before it."""
        draws, after = plan_batch(mix, proportions, self.batch_sequences, self.seed, step)
        mine = draws[self.rank :: self.world]
        served = self.repeats or all(drawn <= self.sequences[domain] for domain, drawn in after.drawn.items())
        self.ahead = _Plan(step, mine, after, self.reader.submit(self.source.fetch, mine) if served else None)

    def next(self, step: int, mix: MixState, proportions: dict[str, float]) -> Batch:
        """The batch of `step`; what was read ahead is used where it was read for this step.

        Raises DomainExhausted, on every rank alike, where a domain would repeat and may not.
        """
        began = time.perf_counter()
        if self.ahead is None or self.ahead.step != step:
            self.read_ahead(step, mix, proportions)
        plan, self.ahead = self.ahead, None
        assert plan is not None
        if plan.reading is None:
            require_unrepeated(plan.mix, self.sequences, step)
        assert plan.reading is not None
        sequences = plan.reading.result()
        tokens_NT = torch.from_numpy(sequences.tokens_NT.astype(np.int64))
        return Batch(plan.draws, tokens_NT, sequences.sequence_ids_N, plan.mix, time.perf_counter() - began)


def micro_batches_per_rank(batch_sequences: int, world: int, micro_batch_sequences: int) -> int:
    """Forward passes of each rank for one global batch; where they do not divide it, some ranks' last one is short."""
    return -(-batch_sequences // (world * micro_batch_sequences))
