"""The mixture rules against closed forms worked by hand, and the bounds as invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearing.data.config import RULE_WORDS, MixtureConfig
from shearing.data.mixture import (
    Decision,
    MixtureState,
    check_bounds,
    initial_state,
    next_state,
    read_decisions,
    replay,
    write_decision,
)
from shearing.data.mixture_rules import RULES, project
from shearing.errors import UserError
from shearing.storage import open_store

PRIOR = {"a": 0.5, "b": 0.3, "c": 0.2}
REFERENCES = {"a": 2.0, "b": 1.0, "c": 1.5}


def after(config: MixtureConfig, losses: dict[str, float], before: dict[str, float] | None = None) -> MixtureState:
    state = MixtureState(version=4, step=100, proportions=before or PRIOR)
    return next_state(state, losses, REFERENCES, config, PRIOR, step=150)


def test_sheared_closed_form():
    """Algorithm 1: excesses ln 2, 0 (clipped from -0.7) and ln 3 give weights 1.0, 0.3, 0.6 over 1.9."""
    losses = {"a": 2.0 + math.log(2), "b": 0.3, "c": 1.5 + math.log(3)}
    state = after(MixtureConfig(rule="sheared"), losses)
    assert state.proportions == pytest.approx({"a": 1.0 / 1.9, "b": 0.3 / 1.9, "c": 0.6 / 1.9}, abs=1e-12)
    assert (state.version, state.step, state.losses, state.warnings) == (5, 150, losses, [])


def test_sheared_unclipped_closed_form():
    """The released code: excesses ln 2, -ln 3, 0 give 1.0, 0.1, 0.2 over 1.3, then a share of 1e-4 spread evenly."""
    losses = {"a": 2.0 + math.log(2), "b": 1.0 - math.log(3), "c": 1.5}
    state = after(MixtureConfig(rule="sheared_unclipped"), losses)
    softmax = {"a": 1.0 / 1.3, "b": 0.1 / 1.3, "c": 0.2 / 1.3}
    assert state.proportions == pytest.approx({d: 0.9999 * p + 1e-4 / 3 for d, p in softmax.items()}, abs=1e-12)


def test_update_accumulates_as_the_paper_warns():
    """A lasting gap of 0.1 nats over 64 updates is odds of e^6.4 = 602 to 1."""
    config = MixtureConfig(rule="sheared")
    state = initial_state(config, {"a": 0.5, "b": 0.5})
    for step in range(64):
        state = next_state(state, {"a": 2.1, "b": 1.0}, {"a": 2.0, "b": 1.0}, config, {"a": 0.5, "b": 0.5}, step=step)
    assert state.version == 64
    assert state.proportions["a"] / state.proportions["b"] == pytest.approx(math.exp(6.4), rel=1e-9)


@pytest.mark.parametrize(("rule", "expected"), [("static", PRIOR), ("uniform", dict.fromkeys("abc", 1 / 3))])
def test_rules_that_do_not_look_at_losses(rule, expected):
    """Catches a static mixture that keeps what another rule left, and a uniform one that starts at the prior."""
    config = MixtureConfig(rule=rule)
    assert initial_state(config, PRIOR).proportions == pytest.approx(expected, abs=1e-12)
    moved = after(config, {"a": 9.0, "b": 1.0, "c": 1.0}, before={"a": 0.1, "b": 0.1, "c": 0.8})
    assert moved.proportions == pytest.approx(expected, abs=1e-12)


def test_prior_pull_closed_form():
    """Half way from 1.0/1.5, 0.3/1.5, 0.2/1.5 back to the prior."""
    state = after(MixtureConfig(prior_pull=0.5), {"a": 2.0 + math.log(2), "b": 1.0, "c": 1.5})
    expected = {"a": (1 / 1.5 + 0.5) / 2, "b": (0.2 + 0.3) / 2, "c": (0.2 / 1.5 + 0.2) / 2}
    assert state.proportions == pytest.approx(expected, abs=1e-12)


def test_cap_and_floor_closed_form():
    """0.9, 0.09, 0.01 within [0.05, 0.7]: the first is cut to 0.7, the last raised to 0.05, the middle one fills."""
    assert project(np.array([0.9, 0.09, 0.01]), 0.05, 0.7) == pytest.approx([0.7, 0.25, 0.05], abs=1e-12)
    # only the cap binds: the other two share 0.3 in their ratio of 9 to 1
    assert project(np.array([0.9, 0.09, 0.01]), 0.0, 0.7) == pytest.approx([0.7, 0.27, 0.03], abs=1e-12)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_projection_holds_both_bounds_and_keeps_ratios(weights, low, high):
    """Catches floors broken by normalising after clipping, and order or ratios between free domains lost."""
    count = len(weights)
    floor, cap = low / count, 1 / count + high * (1 - 1 / count)
    shares = np.maximum(weights, 1e-12)
    bounded = project(shares, floor, cap)
    assert bounded.sum() == pytest.approx(1, abs=1e-9)
    assert bounded.min() >= floor - 1e-12
    assert bounded.max() <= cap + 1e-12
    assert project(bounded, floor, cap) == pytest.approx(bounded, abs=1e-9)
    free = (bounded > floor + 1e-9) & (bounded < cap - 1e-9)
    ratios = bounded[free] / shares[free]
    assert len(ratios) == 0 or ratios.max() == pytest.approx(ratios.min(), rel=1e-6)
    assert all(np.diff(bounded[np.argsort(shares, kind="stable")]) >= -1e-12)


finite = st.floats(0, 20)
anything = st.one_of(finite, st.just(math.nan), st.just(math.inf), st.just(-math.inf))


@settings(max_examples=200)
@given(
    st.sampled_from(RULE_WORDS),
    st.lists(st.fixed_dictionaries({"a": anything, "b": anything, "c": anything}), min_size=1, max_size=6),
    st.sampled_from([(0.0, 1.0), (0.05, 0.6), (0.1, 0.5), (1 / 3, 1 / 3), (0.0, 1 / 3)]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_losses_leave_a_distribution_within_bounds(rule, evaluations, bounds, pull):
    """Catches the released code's fault: one NaN loss turns all proportions NaN."""
    config = MixtureConfig(rule=rule, floor=bounds[0], cap=bounds[1], prior_pull=pull)
    state = initial_state(config, PRIOR)
    for losses in evaluations:
        before, state = state, next_state(state, losses, REFERENCES, config, PRIOR, step=1)
        values = np.array(list(state.proportions.values()))
        assert np.isfinite(values).all()
        assert values.sum() == pytest.approx(1, abs=1e-9)
        assert values.min() >= config.floor - 1e-9
        assert values.max() <= config.cap + 1e-9
        bad = [d for d, loss in losses.items() if not math.isfinite(loss)]
        assert len(state.warnings) == len(bad)
        for domain in bad:
            assert state.proportions[domain] == before.proportions[domain]
            assert state.losses[domain] is None


def test_one_loss_missing_moves_the_others_by_the_rule():
    """b keeps 0.3; a and c share 0.7 as 1.0 to 0.2."""
    state = after(MixtureConfig(), {"a": 2.0 + math.log(2), "b": math.nan, "c": 1.5})
    assert state.proportions == pytest.approx({"a": 0.7 / 1.2, "b": 0.3, "c": 0.7 * 0.2 / 1.2}, abs=1e-12)
    assert state.warnings == ["domain b: its loss is nan (reference 1.0); it keeps its proportion 0.3000"]


def test_a_domain_of_which_nothing_was_read_keeps_its_proportion():
    """Catches a made-up loss for a domain that no training batch drew from: 0, or the last known one, for ever."""
    state = after(MixtureConfig(), {"a": 2.0 + math.log(2), "b": None, "c": 1.5})
    assert state.proportions == pytest.approx({"a": 0.7 / 1.2, "b": 0.3, "c": 0.7 * 0.2 / 1.2}, abs=1e-12)
    assert state.warnings == ["domain b: nothing of it was read since the last update; it keeps its proportion 0.3000"]


def test_all_losses_missing_changes_nothing():
    state = after(MixtureConfig(prior_pull=0.5), dict.fromkeys("abc", math.inf), before={"a": 0.1, "b": 0.2, "c": 0.7})
    assert state.proportions == {"a": 0.1, "b": 0.2, "c": 0.7}
    assert len(state.warnings) == 3


def test_state_survives_json_exactly_even_with_losses_that_are_not_finite():
    """Catches NaN written as invalid JSON, and proportions rounded on the way to a checkpoint."""
    state = after(MixtureConfig(), {"a": 2.0 + math.log(2), "b": math.nan, "c": 1.7})
    assert MixtureState.model_validate_json(state.model_dump_json()) == state


def test_bounds_without_a_solution_say_what_to_set():
    with pytest.raises(UserError, match=r"mixture.floor = 0.2 for each of 7 .*Set mixture.floor=0.1428"):
        check_bounds(MixtureConfig(floor=0.2), 7)
    with pytest.raises(UserError, match=r"mixture.cap = 0.1 for each of 7 .*Set mixture.cap=0.1429"):
        initial_state(MixtureConfig(cap=0.1), {f"d{i}": 1 / 7 for i in range(7)})


def test_decisions_after_a_rewind_drop_what_was_abandoned(tmp_path):
    """Catches a history that mixes two timelines after a run went back to its checkpoint."""
    folder = open_store(str(tmp_path / "mixture"))
    assert read_decisions(folder) == []
    for version in range(5):
        state = MixtureState(version=version, step=50 * version, proportions=PRIOR)
        write_decision(folder, Decision(state=state, attempt="one", world=2))
    rewound = MixtureState(version=3, step=150, proportions=PRIOR)
    write_decision(folder, Decision(state=rewound, attempt="two", world=1))
    assert [(d.state.version, d.attempt) for d in read_decisions(folder)] == [
        (0, "one"),
        (1, "one"),
        (2, "one"),
        (3, "two"),
    ]


def test_every_word_has_a_rule():
    assert set(RULES) == set(RULE_WORDS)


def history(config: MixtureConfig, updates: int = 9) -> list[MixtureState]:
    """Versions as they come back from the files that a run wrote, with losses that move and one that is missing."""
    states = [initial_state(config, PRIOR)]
    for number in range(1, updates + 1):
        losses = {"a": 2.2 - 0.01 * number, "b": 1.1 + 0.02 * number, "c": math.nan if number == 4 else 1.9}
        states.append(next_state(states[-1], losses, REFERENCES, config, PRIOR, step=10 * number))
    return [MixtureState.model_validate_json(state.model_dump_json()) for state in states]


@pytest.mark.parametrize("rule", RULE_WORDS)
def test_a_history_is_replayed_by_every_rule(rule):
    """Catches a rule with state outside the history: a replay, or a run that resumed, would go another way."""
    config = MixtureConfig(rule=rule, floor=0.05, cap=0.8, prior_pull=0.1, temperature=3.0)
    found = replay(history(config), config, PRIOR)
    assert (found.equal, found.versions, found.how) == (True, 10, "")


def test_replay_says_where_a_history_was_changed():
    """Catches a replay that starts from each recorded version anew, or that compares nothing."""
    config = MixtureConfig(rule="dro")
    states = history(config)
    losses = states[6].losses | {"a": 3.0}
    tampered = [*states[:6], states[6].model_copy(update={"losses": losses}), *states[7:]]
    assert replay(tampered, config, PRIOR).differs_at == 6
    assert "a was given" in replay(tampered, config, PRIOR).how
    moved = states[5].model_copy(update={"proportions": {"a": 0.2, "b": 0.3, "c": 0.5}})
    assert replay([*states[:5], moved, *states[6:]], config, PRIOR).differs_at == 5
    forgotten = states[3].model_copy(update={"memory": {}})
    assert replay([*states[:3], forgotten, *states[4:]], config, PRIOR).how.startswith("what the rule remembered")
    assert replay([*states[:4], *states[5:]], config, PRIOR).how == "version 5 stands where version 4 belongs"
    assert replay(states, MixtureConfig(rule="sheared"), PRIOR).differs_at == 1
    assert replay(states, config, PRIOR | {"a": 0.9}).differs_at == 0
    assert replay([], config, PRIOR).equal
