import threading

import numpy as np
import pytest
import torch
from tiny_corpus import split_of_shards

from shearing.data.mixing import DomainExhausted, MixState, plan_batch
from shearing.data.source import Sequences
from shearing.training.batches import BatchStream

HALVES = {"a": 0.5, "b": 0.5}
START = MixState.start(["a", "b"])


class Numbered:
    """Rows that tell their draw; reading can be held up, or fail."""

    def __init__(self):
        self.asked, self.gate, self.error = [], threading.Event(), None
        self.gate.set()

    def fetch(self, draws):
        self.asked.append(list(draws))
        assert self.gate.wait(timeout=20)
        if self.error:
            raise self.error
        ids = np.array([1000 * (draw.domain == "b") + draw.index for draw in draws])
        return Sequences(np.repeat(ids[:, None], 3, axis=1).astype(np.uint16), ids)


def stream(source, rank=0, world=1, repeats=True, sequences=10):
    splits = {"a": split_of_shards((0, sequences)), "b": split_of_shards((0, 100))}
    return BatchStream(source, splits, 6, seed=4, rank=rank, world=world, repeats=repeats)


class TestNext:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_ranks_share_the_plan(self, world):
        # catches a batch that depends on the number of ranks, or rows in another order than their draws
        plan, after = plan_batch(START, HALVES, 6, 4, 0)
        batches = [stream(Numbered(), rank, world).next(0, START, HALVES) for rank in range(world)]
        assert sorted(draw for batch in batches for draw in batch.draws) == sorted(plan)
        for rank, batch in enumerate(batches):
            assert batch.draws == plan[rank::world]
            assert batch.mix == after
            assert batch.tokens_NT.dtype == torch.int64
            assert batch.tokens_NT[:, 0].tolist() == batch.sequence_ids.tolist()
            assert batch.sequence_ids.tolist() == [1000 * (d.domain == "b") + d.index for d in batch.draws]

    def test_a_source_that_fails(self):
        # catches an error lost in the reading thread, which would leave the trainer waiting
        source = Numbered()
        source.error = OSError("shard gone")
        with pytest.raises(OSError, match="shard gone"):
            stream(source).next(0, START, HALVES)


class TestReadAhead:
    def test_is_used_once(self):
        # catches a batch read twice, or served twice
        source = Numbered()
        batches = stream(source)
        batches.read_ahead(0, START, HALVES)
        first = batches.next(0, START, HALVES)
        second = batches.next(1, first.mix, HALVES)
        assert source.asked == [first.draws, second.draws]
        assert not set(first.draws) & set(second.draws)

    @pytest.mark.parametrize(("settled", "steps"), [(40, [1, 2, 4, 8, 8]), (9, [1, 2, 4, 3]), (1, [1, 1])])
    def test_requests_grow_and_end_where_proportions_may_change(self, settled, steps):
        # catches a request for each step of each of hundreds of ranks, and rows read that an update makes useless
        source, mix = Numbered(), START
        batches, alone = stream(source, rank=1, world=2), stream(Numbered(), rank=1, world=2)
        for step in range(10):
            batch = batches.next(step, mix, HALVES)
            expected = alone.next(step, mix, HALVES)
            assert batch.draws == expected.draws
            assert batch.mix == expected.mix
            assert batch.tokens_NT[:, 0].tolist() == batch.sequence_ids.tolist() == expected.sequence_ids.tolist()
            mix = batch.mix
            batches.read_ahead(step + 1, mix, HALVES, settled - step)
        batches.reader.shutdown()
        assert [len(draws) // 3 for draws in source.asked][: len(steps)] == steps

    def test_the_next_request_is_on_its_way_while_one_is_used(self):
        # catches a source that stands idle until all it brought is used up
        source, mix = Numbered(), START
        batches = stream(source)
        for step in range(20):
            mix = batches.next(step, mix, HALVES).mix
            batches.read_ahead(step + 1, mix, HALVES, 100 - step)
            assert len(batches.ahead) >= min(step + 1, 8)

    def test_does_not_wait(self):
        # catches reading in the trainer's own thread
        source = Numbered()
        source.gate.clear()
        batches = stream(source)
        batches.read_ahead(0, START, HALVES)
        source.gate.set()
        assert batches.next(0, START, HALVES).wait_s < 10

    def test_for_another_step_is_dropped(self):
        # catches the batch of step 5 served as that of step 0 after a restore
        batches = stream(Numbered())
        batches.read_ahead(5, START, {"a": 1.0, "b": 0.0})
        batch = batches.next(0, START, HALVES)
        assert sorted(batch.draws) == sorted(plan_batch(START, HALVES, 6, 4, 0)[0])


class TestExhausted:
    def test_stops_at_the_step_that_would_repeat(self):
        # catches stopping a step early (when it is read ahead) or late, and reading rows that cannot be used
        source = Numbered()
        batches, mix = stream(source, repeats=False), START
        for step in range(3):
            batch = batches.next(step, mix, HALVES)
            mix = batch.mix
            batches.read_ahead(step + 1, mix, HALVES)
        with pytest.raises(DomainExhausted, match=r"domain a ran out at step 3: 12 sequences .* it holds 10"):
            batches.next(3, mix, HALVES)
        assert len(source.asked) == 3

    def test_exactly_used_up_is_no_error(self):
        # catches an off-by-one at a domain's last sequence
        batches, mix = stream(Numbered(), repeats=False, sequences=9), START
        for step in range(3):
            mix = batches.next(step, mix, HALVES).mix
        assert mix.drawn["a"] == 9

    def test_repeating_goes_on(self):
        batches, mix = stream(Numbered(), repeats=True, sequences=4), START
        for step in range(4):
            mix = batches.next(step, mix, HALVES).mix
        assert mix.drawn == {"a": 12, "b": 12}


class TestMicroBatches:
    @pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (9, [6])])
    def test_pieces(self, size, lengths):
        # catches rows lost at the end, and draws that do not belong to their rows
        batch = stream(Numbered()).next(0, START, HALVES)
        pieces = list(batch.micro_batches(size, -(-len(batch.draws) // size)))
        assert [len(draws) for draws, _ in pieces] == lengths
        assert [draw for draws, _ in pieces for draw in draws] == batch.draws
        assert torch.equal(torch.cat([tokens for _, tokens in pieces]), batch.tokens_NT)
