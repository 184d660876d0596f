"""Batches that follow the proportions, and nothing lost or repeated whatever the number of workers."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearing.data.mixing import (
    DomainExhausted,
    Draw,
    EpochStart,
    MixState,
    epoch_starts,
    plan_batch,
    require_unrepeated,
)

weights = st.lists(st.floats(0.001, 1), min_size=1, max_size=9)


def named(values: list[float]) -> dict[str, float]:
    return {f"d{i}": v / sum(values) for i, v in enumerate(values)}


@settings(max_examples=80)
@given(weights, st.integers(1, 40), st.integers(0, 1000))
def test_drawn_is_within_one_sequence_of_asked_at_every_step(values, sequences, seed):
    """Catches independent draws, rounding that favours large domains, and a rare domain that starves."""
    proportions, state = named(values), MixState.start(list(named(values)))
    for step in range(60):
        plan, state = plan_batch(state, proportions, sequences, seed, step)
        assert len(plan) == sequences
        for domain, p in proportions.items():
            assert abs(state.drawn[domain] - p * sequences * (step + 1)) < 1 + 1e-6
            assert state.credit[domain] == pytest.approx(p * sequences * (step + 1) - state.drawn[domain], abs=1e-6)


@settings(max_examples=80)
@given(st.data(), st.integers(1, 9))
def test_within_one_sequence_while_proportions_change_and_all_are_owed_one(data, domains):
    """Catches credit that is lost or counted twice when a new version of the proportions takes effect."""
    sequences = data.draw(st.integers(domains, 64))
    state = MixState.start([f"d{i}" for i in range(domains)])
    asked = dict.fromkeys(state.drawn, 0.0)
    for step in range(25):
        free = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=domains, max_size=domains)))
        shares = 1 + free / free.sum() * (sequences - domains)
        proportions = {f"d{i}": s / sequences for i, s in enumerate(shares)}
        _, state = plan_batch(state, proportions, sequences, 1, step)
        for domain, p in proportions.items():
            asked[domain] += p * sequences
            assert abs(state.drawn[domain] - asked[domain]) < 1 + 1e-6


@settings(max_examples=60)
@given(st.data(), st.integers(2, 9), st.integers(1, 12))
def test_bounds_for_any_change_of_proportions(data, domains, sequences):
    """Catches a rare domain overdrawn or left behind without bound when proportions jump to and fro."""
    state = MixState.start([f"d{i}" for i in range(domains)])
    harmonic = sum(1 / i for i in range(1, domains + 1))
    for step in range(40):
        values = data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=domains, max_size=domains))
        proportions = named(values) if sum(values) else named([1.0] * domains)
        plan, state = plan_batch(state, proportions, sequences, 1, step)
        assert len(plan) == sequences
        assert min(state.credit.values()) > -1 - 1e-9
        assert max(state.credit.values()) < 1 + harmonic
        assert sum(state.credit.values()) == pytest.approx(0, abs=1e-6)


@settings(max_examples=40)
@given(weights, st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 33))
def test_every_index_once_whatever_the_number_of_workers(values, worlds, sequences):
    """Catches a position that depends on the number of workers: a resized group would skip or repeat sequences."""
    proportions, state = named(values), MixState.start(list(named(values)))
    served: Counter[Draw] = Counter()
    for step, world in enumerate(worlds):
        for rank in range(world):
            restored = MixState.from_json(json.loads(json.dumps(state.to_json())))
            served.update(plan_batch(restored, proportions, sequences, 9, step)[0][rank::world])
        state = plan_batch(state, proportions, sequences, 9, step)[1]
    assert set(served.values()) == {1}
    assert set(served) == {Draw(d, i) for d, n in state.drawn.items() for i in range(n)}


def test_new_proportions_reach_the_next_batch_at_once():
    """Catches buffered batches that still follow the proportions of before an update."""
    state = MixState.start(["a", "b"])
    for step in range(10):
        _, state = plan_batch(state, {"a": 0.9, "b": 0.1}, 100, 1, step)
    plan, _ = plan_batch(state, {"a": 0.2, "b": 0.8}, 100, 1, 10)
    assert Counter(d.domain for d in plan) == {"a": 20, "b": 80}


def test_batch_is_shuffled_by_seed_and_step():
    """Catches a batch sorted by domain: rank 0 would train on one domain only."""
    state = MixState.start(["a", "b"])
    plans = [plan_batch(state, {"a": 0.5, "b": 0.5}, 64, seed, step)[0] for seed, step in [(1, 1), (1, 2), (2, 1)]]
    assert len({tuple(p) for p in plans}) == 3
    assert {frozenset(p) for p in plans} == {frozenset(plans[0])}
    assert 8 <= sum(d.domain == "a" for d in plans[0][::2]) <= 24


def test_absent_proportion_draws_nothing():
    """Catches a float residue that gives a domain of proportion 0 a sequence."""
    state = MixState.start(["a", "b", "c"])
    for step in range(200):
        _, state = plan_batch(state, {"a": 0.3, "b": 0.7, "c": 0.0}, 7, 1, step)
    assert state.drawn["c"] == 0


def test_exhausted_domain_is_named_with_what_to_change():
    state = MixState({"a": 0.0, "b": 0.0}, {"a": 12, "b": 5})
    require_unrepeated(state, {"a": 12, "b": 5}, 3)
    with pytest.raises(DomainExhausted, match=r"domain a ran out at step 3: 12 .* holds 11.*on_exhausted=next_epoch"):
        require_unrepeated(state, {"a": 11, "b": 5}, 3)


def test_epoch_starts_are_counted_when_the_first_repeated_sequence_is_drawn():
    """Catches an epoch announced when the last one is merely used up, or skipped when a batch spans two."""
    at = lambda n: MixState({"a": 0.0}, {"a": n})  # noqa: E731
    assert epoch_starts(at(0), at(10), {"a": 10}) == []
    assert epoch_starts(at(10), at(11), {"a": 10}) == [EpochStart("a", 1)]
    assert epoch_starts(at(11), at(20), {"a": 10}) == []
    assert epoch_starts(at(5), at(31), {"a": 10}) == [EpochStart("a", 1), EpochStart("a", 2), EpochStart("a", 3)]
