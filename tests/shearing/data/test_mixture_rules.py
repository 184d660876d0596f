"""The rules against closed forms, brute force, and the published code's own arithmetic done by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shearing.data.config import MixtureConfig
from shearing.data.mixture import initial_state, next_state
from shearing.data.mixture_rules import chi_square_ball, tempered
from shearing.errors import UserError

PRIOR = {"a": 0.5, "b": 0.3, "c": 0.2}
ZERO = dict.fromkeys(PRIOR, 0.0)


def chi_square(q, p):
    return 0.5 * float((p * (q / p - 1) ** 2).sum())


def test_two_domains_in_the_ball_closed_form():
    """With p = 1/2 each, the whole radius goes to the worse one: q = 1/2 + sqrt(2 rho)/2."""
    q_D = chi_square_ball(np.array([0.5, 0.5]), np.array([0.1, 0.9]), rho=0.1, smallest_ratio=0.2)
    assert q_D == pytest.approx([0.5 - math.sqrt(0.05), 0.5 + math.sqrt(0.05)], abs=1e-8)
    # a ball so wide that only the smallest ratio holds: 0.2 of its half stays
    q_D = chi_square_ball(np.array([0.5, 0.5]), np.array([0.1, 0.9]), rho=9.0, smallest_ratio=0.2)
    assert q_D == pytest.approx([0.1, 0.9], abs=1e-8)


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([0.0, 0.2]),
)
def test_no_mixture_in_the_ball_is_worse(centre, excess, rho, ratio):
    """Against every mixture of a grid. Catches eta of the wrong end, and a radius of the q before its floor."""
    p_D, d_D = np.array(centre) / sum(centre), np.array(excess)
    q_D = chi_square_ball(p_D, d_D, rho, ratio)
    assert q_D.sum() == pytest.approx(1, abs=1e-9)
    assert (q_D >= ratio * p_D - 1e-12).all()
    assert chi_square(q_D, p_D) <= rho + 1e-9
    assert chi_square_ball(p_D, d_D + 7.0, rho, ratio) == pytest.approx(q_D, abs=1e-6)
    best = float(q_D @ d_D)
    for i, j in itertools.product(range(41), range(41)):
        other_D = np.array([i, j, 40 - i - j]) / 40
        if other_D.min() >= 0 and (other_D >= ratio * p_D).all() and chi_square(other_D, p_D) <= rho:
            assert other_D @ d_D <= best + 1e-6


def test_dro_does_not_run_away():
    """The paper's rule adds to a lasting gap for ever; this stays within the ball around at most twice the prior."""
    config = MixtureConfig(rule="dro")
    state = initial_state(config, PRIOR)
    assert state.proportions == pytest.approx(PRIOR)
    seen = []
    for step in range(150):
        state = next_state(state, {"a": 1.0, "b": 1.0, "c": 2.0}, ZERO, config, PRIOR, step=step)
        seen.append(state.proportions["c"])
    centre = np.array(list(state.memory["centre"].values()))
    assert centre.sum() == pytest.approx(1, abs=1e-9)
    assert state.memory["centre"]["c"] == pytest.approx(0.4, abs=1e-6)
    assert seen[-1] == pytest.approx(seen[-50], abs=1e-6)
    assert seen[0] == pytest.approx(0.2 + 0.2 * math.sqrt(2 * 0.1 * 0.8 / 0.2), abs=1e-6)  # closed form, two levels


def test_dro_options_are_its_own():
    config = MixtureConfig(rule="dro", dro={"rho": 1e-9, "centre_step": 0.0})
    state = next_state(initial_state(config, PRIOR), {"a": 1.0, "b": 5.0, "c": 2.0}, ZERO, config, PRIOR, step=1)
    assert state.proportions == pytest.approx(PRIOR, abs=1e-3)
    assert state.memory["centre"] == pytest.approx(PRIOR)


def test_exp3_as_the_published_code_counts():
    """Its update, done by hand with every domain seen. Catches rewards divided by the new proportions, e_t off by one,
    and rewards that are forgotten."""
    prior, config = {"a": 0.7, "b": 0.3}, MixtureConfig(rule="exp3")
    losses = [{"a": 2.0, "b": 4.0}, {"a": 2.5, "b": 3.0}, {"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.2}]
    state, rewards, shares, before = initial_state(config, prior), [0.0, 0.0], [0.7, 0.3], 0.5
    for t, loss in enumerate(losses, start=1):
        state = next_state(state, loss, {"a": 9.0, "b": 0.0}, config, prior, step=t)
        rewards = [r + value / 10 / share for r, value, share in zip(rewards, loss.values(), shares, strict=True)]
        explore = min(0.5, math.sqrt(math.log(2) / (2 * t)))
        powers = [math.exp(r * before) for r in rewards]
        shares = [(1 - 2 * explore) * power / sum(powers) + explore for power in powers]
        before = explore
        assert list(state.proportions.values()) == pytest.approx(shares, abs=1e-12)
    assert list(state.memory["rewards"].values()) == pytest.approx(rewards, abs=1e-12)
    assert explore < 0.5, "the rule has to have left its uniform beginning"


def test_exp3_keeps_the_reward_of_a_domain_without_a_loss():
    config = MixtureConfig(rule="exp3")
    state = initial_state(config, PRIOR)
    for step in range(8):
        losses = {"a": 2.0, "b": None if step == 7 else 3.0, "c": 1.0}
        before, state = state, next_state(state, losses, ZERO, config, PRIOR, step=step)
    assert state.memory["rewards"]["b"] == before.memory["rewards"]["b"]
    assert state.memory["rewards"]["a"] > before.memory["rewards"]["a"]
    assert state.proportions["b"] == before.proportions["b"]


def test_temperature_closed_form():
    """sqrt of 0.64, 0.32, 0.04 is 0.8, 0.5657, 0.2 over their sum; 1 is the prior and a large one equal shares."""
    prior_D = np.array([0.64, 0.32, 0.04])
    total = 0.8 + math.sqrt(0.32) + 0.2
    assert tempered(prior_D, 2.0) == pytest.approx([0.8 / total, math.sqrt(0.32) / total, 0.2 / total], abs=1e-12)
    assert tempered(prior_D, 1.0) == pytest.approx(prior_D, abs=1e-12)
    assert tempered(prior_D, 1e9) == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("rule", ["uniform", "temperature"])
def test_still_rules_begin_where_they_stay(rule):
    """Catches a first stretch at the prior, or a pull that begins with the first update."""
    config = MixtureConfig(rule=rule, prior_pull=0.3, cap=0.45)
    start = initial_state(config, PRIOR)
    moved = next_state(start, {"a": 9.0, "b": 1.0, "c": 1.0}, ZERO, config, PRIOR, step=1)
    assert moved.proportions == pytest.approx(start.proportions, abs=1e-12)
    assert start.proportions["a"] < 0.5


def test_an_unknown_rule_is_refused_with_the_nearest_word():
    with pytest.raises(ValidationError, match="Did you mean sheared"):
        MixtureConfig(rule="shered")
    for path in ("rules", "rules/mine.py:best", "a b:c", "pkg:", ":f"):
        with pytest.raises(ValidationError, match=r"package\.module:function"):
            MixtureConfig(rule=path)
    assert MixtureConfig(rule="pkg.rules:best").is_path


RULES_OF_A_USER = """
from shearing.data.mixture_rules import Ruling

def to_the_worst(situation):
    return [1.0 if x == situation.excess_D.max() else 0.0 for x in situation.excess_D]

def counts(situation):
    seen = situation.memory.get("seen", 0) + 1
    return Ruling(situation.prior_D ** seen, {"seen": seen, "last": dict(zip(situation.domains, situation.losses_D))})

def breaks(situation):
    return 1 / 0

def forgets_one(situation):
    return [1.0]

def negative(situation):
    return [-1.0] * len(situation.domains)

def remembers_too_much(situation):
    return Ruling(situation.prior_D, {"x": object()})
"""


@pytest.fixture
def own_rules(tmp_path, monkeypatch):
    (tmp_path / "rules_of_a_user.py").write_text(RULES_OF_A_USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name, **keys: MixtureConfig(rule=f"rules_of_a_user:{name}", **keys)


def test_a_rule_of_the_users_own(own_rules):
    """Catches floor and pull left out for it, domains without a loss shown to it, and a memory that is lost."""
    losses = {"a": 1.0, "b": math.nan, "c": 3.0}
    config = own_rules("to_the_worst", floor=0.05, prior_pull=0.1)
    state = next_state(initial_state(config, PRIOR), losses, ZERO, config, PRIOR, step=1)
    pulled = 0.1 * 0.5 / 0.7 * 0.7
    assert state.proportions == pytest.approx({"a": pulled, "b": 0.3, "c": 0.7 - pulled}, abs=1e-12)
    config = own_rules("counts")
    state = next_state(initial_state(config, PRIOR), losses, ZERO, config, PRIOR, step=1)
    state = next_state(state, losses, ZERO, config, PRIOR, step=2)
    assert state.memory == {"seen": 2.0, "last": {"a": 1.0, "c": 3.0}}
    assert state.proportions["a"] / state.proportions["c"] == pytest.approx(0.25 / 0.04)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", "failed at step 1: ZeroDivisionError"),
        ("forgets_one", "needed: 3 weights, one for each of a, b, c"),
        ("negative", "none negative"),
        ("remembers_too_much", "wants to remember"),
        ("absent", "absent does not exist in"),
    ],
)
def test_what_a_rule_may_do_wrong_is_said(own_rules, name, message):
    config = own_rules(name)
    with pytest.raises(UserError, match=message):
        next_state(initial_state(config, PRIOR), {"a": 1.0, "b": 2.0, "c": 3.0}, ZERO, config, PRIOR, step=1)
