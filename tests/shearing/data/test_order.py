"""The order of draws: a permutation in every epoch, the same everywhere, well mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearing.data.manifest import ShardEntry, SplitEntry
from shearing.data.order import SequenceOrder
from shearing.errors import UserError


def entry(shards: list[list[int]], sequence_tokens: int = 16) -> SplitEntry:
    """A split from the row-group sizes of each shard."""
    total = sum(map(sum, shards))
    return SplitEntry(
        sequences=total,
        tokens=total * sequence_tokens,
        documents=total,
        text_bytes=total,
        shards=[
            ShardEntry(
                path=f"{i}.parquet",
                sequences=sum(s),
                first_sequence_id=i << 32,
                row_group_sequences=s,
                sha256="",
                file_bytes=1,
            )
            for i, s in enumerate(shards)
        ],
    )


splits = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=60)
@given(splits, st.integers(0, 2**31), st.integers(1, 400))
def test_every_epoch_is_a_permutation_of_all_rows(shards, seed, unit_tokens):
    """Catches a short last row group or shard that shifts rows, so that some come twice and others never."""
    order = SequenceOrder("wiki", entry(shards), seed, unit_tokens)
    everything = sorted((f"{i}.parquet", row) for i, s in enumerate(shards) for row in range(sum(s)))
    for epoch in range(3):
        places = [order.locate(epoch * order.sequences + i) for i in range(order.sequences)]
        assert {p.epoch for p in places} == {epoch}
        assert sorted((p.shard, p.row) for p in places) == everything


@settings(max_examples=40)
@given(splits, st.integers(1, 400), st.integers(0, 500))
def test_units_one_after_another_agree_with_locate(shards, unit_tokens, start):
    """Catches a stream that, rebuilt in the middle, counts on from another draw than it was asked for."""
    order = SequenceOrder("wiki", entry(shards), 5, unit_tokens)
    first, expected = order.unit_number(start), None
    for number in range(first, first + 4):
        unit = order.unit(number)
        assert expected is None or unit.first_index == expected
        expected = unit.end_index
        first_row = {(s, g): int(np.cumsum([0, *shards[int(s[0])]])[g]) for s, g in unit.pieces}
        joined = [(s, first_row[s, g] + r) for s, g in unit.pieces for r in range(shards[int(s[0])][g])]
        for i in range(unit.rows):
            place = order.locate(unit.first_index + i)
            assert (place.shard, place.row) == joined[unit.arrangement[i]]
            assert order.unit_number(unit.first_index + i) == unit.number


def test_same_order_in_another_process_and_asked_in_another_sequence():
    """Catches state that depends on earlier calls: a resumed run would train on other sequences. Constants pinned."""
    shards = [[8] * 20, [8] * 13 + [3]]
    forward, backward = (SequenceOrder("wiki", entry(shards), 17, 400) for _ in range(2))
    indices = range(0, 1500, 7)
    there = {i: forward.locate(i) for i in indices}
    assert there == {i: backward.locate(i) for i in reversed(indices)}
    assert [(forward.locate(i).shard, forward.locate(i).row) for i in (0, 1, 266, 267, 1000)] == PINNED


PINNED = [("1.parquet", 60), ("0.parquet", 26), ("1.parquet", 37), ("0.parquet", 34), ("0.parquet", 24)]


def test_seed_domain_and_epoch_each_change_the_order():
    """Catches a seed that is ignored: every run, domain or epoch would see the same order."""
    shards = [[8] * 20]

    def rows(domain: str, seed: int, epoch: int) -> list[int]:
        order = SequenceOrder(domain, entry(shards), seed, 400)
        return [order.locate(epoch * 160 + i).row for i in range(160)]

    orders = [rows("a", 1, 0), rows("a", 2, 0), rows("b", 1, 0), rows("a", 1, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(np.equal(one, other)) < 0.1


def test_neighbours_come_from_all_over_the_split():
    """Catches units made of neighbouring row groups: a batch would hold pieces of one document."""
    order = SequenceOrder("wiki", entry([[8] * 100]), 3, 16 * 8 * 8)
    rows = np.array([order.locate(i).row for i in range(order.sequences)])
    spread = [np.ptp(rows[i : i + 64]) for i in range(0, 800, 64)]
    assert np.median(spread) > 400


def test_large_split_is_located_without_walking_through_it():
    """Catches work per call that grows with the corpus: 12 million sequences would stall every step."""
    order = SequenceOrder("cc", entry([[64] * 64] * 2930, 4096), 1)
    assert order.sequences > 12_000_000
    order.locate(0)
    seen = {order.locate(i) for i in range(0, 12_000_000, 120_000)}
    assert len(seen) == 100
    assert len(order._epochs) <= 3
    assert len(order._units) <= 16


def test_empty_split_is_refused_by_name():
    with pytest.raises(UserError, match="domain wiki holds no sequences"):
        SequenceOrder("wiki", SplitEntry(sequences=0, tokens=0, documents=0, text_bytes=0, shards=[]), 1)
