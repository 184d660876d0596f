"""Global batches as this rank sees them: planned alike on every rank, read ahead in requests of several steps.

Shapes: N this rank's sequences, T tokens.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from shearing.data.manifest import SplitEntry
from shearing.data.mixing import Draw, MixState, plan_batch, require_unrepeated
from shearing.data.source import STEPS_A_REQUEST, Sequences, SequenceSource


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
    """One batch to come: its rows are the `rows` of what `reading` brings; None where it cannot be served."""

    step: int
    draws: list[Draw]
    mix: MixState
    reading: "Future[Sequences] | None"
    rows: slice


class BatchStream:
    """Turns proportions into batches. Holds no state of its own that a checkpoint would need.

    Args:
        source: Where rows come from; it is asked ahead where the proportions are settled.
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
        self.ahead: deque[_Plan] = deque()
        self.requested_steps = 0

    def read_ahead(self, step: int, mix: MixState, proportions: dict[str, float], settled_steps: int = 1) -> None:
        """Go on reading the batches from `step` on; only those whose proportions can no longer change.

        A request takes its source some time however few rows it asks for. So each asks for twice as many steps as the
        one before, up to STEPS_A_REQUEST, and is made when the first of those is due: the source always has one to
        work on, and the first ones, which are waited for, are short.
        """
        if self.ahead and self.ahead[0].step != step:
            self.ahead.clear()
        if len(self.ahead) > self.requested_steps:
            return
        first, mix = (self.ahead[-1].step + 1, self.ahead[-1].mix) if self.ahead else (step, mix)
        count = min(2 * self.requested_steps or 1, STEPS_A_REQUEST, step + settled_steps - first)
        if count > 0:
            self._request(first, mix, proportions, count)

    def _request(self, first: int, mix: MixState, proportions: dict[str, float], count: int) -> None:
        """Ask for the batches of `count` steps at once, up to the first that would repeat a domain and may not."""
        asked: list[Draw] = []
        planned: list[tuple[list[Draw], MixState]] = []
        for step in range(first, first + count):
            draws, mix = plan_batch(mix, proportions, self.batch_sequences, self.seed, step)
            planned.append((draws[self.rank :: self.world], mix))
            if not self._is_served(mix):
                break
            asked += planned[-1][0]
        reading = self.reader.submit(self.source.fetch, asked) if asked else None
        start = 0
        for step, (mine, after) in enumerate(planned, start=first):
            rows = slice(start, start + len(mine))
            self.ahead.append(_Plan(step, mine, after, reading if self._is_served(after) else None, rows))
            start = rows.stop
        self.requested_steps = count

    def _is_served(self, after: MixState) -> bool:
        """Whether a batch after which so much is drawn repeats no domain that may not."""
        return self.repeats or all(drawn <= self.sequences[domain] for domain, drawn in after.drawn.items())

    def next(self, step: int, mix: MixState, proportions: dict[str, float]) -> Batch:
        """The batch of `step`; what was read ahead is used where it was read for this step.

        Raises DomainExhausted, on every rank alike, where a domain would repeat and may not.
        """
        began = time.perf_counter()
        if not self.ahead or self.ahead[0].step != step:
            self.ahead.clear()
            self._request(step, mix, proportions, 1)
        plan = self.ahead.popleft()
        if plan.reading is None:
            require_unrepeated(plan.mix, self.sequences, step)
        assert plan.reading is not None
        sequences = plan.reading.result()
        tokens_NT = torch.from_numpy(sequences.tokens_NT[plan.rows].astype(np.int64))
        ids_N = sequences.sequence_ids_N[plan.rows]
        return Batch(plan.draws, tokens_NT, ids_N, plan.mix, time.perf_counter() - began)


def micro_batches_per_rank(batch_sequences: int, world: int, micro_batch_sequences: int) -> int:
    """Forward passes of each rank for one global batch; where they do not divide it, some ranks' last one is short."""
    return -(-batch_sequences // (world * micro_batch_sequences))
