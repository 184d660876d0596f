import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import split_of_shards

from shearing.training.consumed import ConsumedSequences, SequenceRepeatedError

SPLIT = split_of_shards((100, 7), (0, 13))
IDS = [*range(13), *range(100, 107)]


def bits(bitmap):
    return int(np.unpackbits(bitmap).sum())


class TestAdd:
    def test_marks_each_sequence_once(self):
        # catches two ids that share a bit
        consumed = ConsumedSequences({"a": SPLIT, "a/b": SPLIT})
        for count, sequence_id in enumerate(IDS, start=1):
            consumed.add("a", 0, np.array([sequence_id]))
            assert bits(consumed.tensors()["a/0"]) == count
        assert consumed.tensors()["a/0"].shape == (3,)

    def test_refuses_a_repetition(self):
        # catches training on a sequence twice: in one batch, and in batches far apart
        consumed = ConsumedSequences({"a": SPLIT})
        consumed.add("a", 0, np.array([3, 104]))
        with pytest.raises(SequenceRepeatedError, match=r"domain a: \[5, 3\] .*epoch 0"):
            consumed.add("a", 0, np.array([5, 3]))
        with pytest.raises(SequenceRepeatedError):
            consumed.add("a", 0, np.array([6, 6]))

    def test_other_epochs_and_domains_are_apart(self):
        # catches a second epoch refused
        consumed = ConsumedSequences({"a": SPLIT, "b": SPLIT})
        for domain, epoch in (("a", 0), ("a", 1), ("b", 0)):
            consumed.add(domain, epoch, np.array(IDS))
        assert {name: bits(bitmap) for name, bitmap in consumed.tensors().items()} == {"a/0": 20, "a/1": 20, "b/0": 20}

    def test_refuses_an_id_of_another_split(self):
        # catches rows of another domain, marked as if they were this one's
        with pytest.raises(ValueError, match="not all of this split"):
            ConsumedSequences({"a": SPLIT}).add("a", 0, np.array([1, 50]))


class TestRoundTrip:
    def test_load(self):
        # catches domains whose names hold the separator, and bitmaps shared with what was loaded
        consumed, again = (ConsumedSequences({"a": SPLIT, "a/b": SPLIT}) for _ in range(2))
        consumed.add("a/b", 2, np.array([5]))
        consumed.add("a", 0, np.array([6]))
        tensors = consumed.tensors()
        again.load(tensors)
        with pytest.raises(SequenceRepeatedError):
            again.add("a/b", 2, np.array([5]))
        again.add("a", 0, np.array([5]))
        assert bits(tensors["a/0"]) == 1
        assert set(again.tensors()) == {"a/0", "a/b/2"}


class TestCheck:
    @settings(deadline=None)
    @given(st.lists(st.sets(st.sampled_from(IDS)), min_size=1, max_size=4))
    def test_sums_of_ranks_tell_every_overlap(self, ranks):
        # catches overlaps that bytes added up would hide: a carry, or a byte that runs over
        merged = np.zeros(3, dtype=np.uint8)
        for ids in ranks:
            consumed = ConsumedSequences({"a": SPLIT})
            if ids:
                consumed.add("a", 0, np.array(sorted(ids)))
                merged += consumed.tensors()["a/0"]
        planned, distinct = sum(map(len, ranks)), len(set().union(*ranks))
        checker = ConsumedSequences({"a": SPLIT})
        if planned == distinct:
            checker.check("a", {"a/0": merged}, planned)
        else:
            with pytest.raises(SequenceRepeatedError, match=f"{planned} sequences were planned"):
                checker.check("a", {"a/0": merged}, planned)

    def test_a_lost_sequence(self):
        # catches a rank that skipped rows
        consumed = ConsumedSequences({"a": SPLIT, "a/b": SPLIT})
        consumed.add("a", 0, np.array([1, 2]))
        consumed.add("a", 1, np.array([1]))
        consumed.add("a/b", 0, np.array([1]))
        consumed.check("a", consumed.tensors(), 3)
        consumed.check("a/b", consumed.tensors(), 1)
        with pytest.raises(SequenceRepeatedError, match="4 sequences were planned and 3 consumed"):
            consumed.check("a", consumed.tensors(), 4)
