"""The rules that turn losses into proportions, each a pure function of what it is shown.

A rule of the user's own has the same form: a function of one `Situation` that returns weights, one a domain, or a
`Ruling` where it wants to remember something. Shape suffix: D domains.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shearing.data.config import DroConfig, MixtureConfig
from shearing.data.rule_by_path import import_rule
from shearing.errors import UserError

SMOOTHING = 1e-4
"""c of Sheared LLaMA's released code: this share of each update is spread evenly."""

EXP3_LOSS_SCALE = 10.0
"""Rewards of EXP3 lie between 0 and 1: losses are taken to be below so many nats."""

SMALLEST_WEIGHT = 1e-12
BISECTIONS = 60

Memory = dict[str, Any]


@dataclass(frozen=True)
class Situation:
    """What a rule sees at an update: the domains whose loss is known, and these only.

    Args:
        domains: Their names; every array has their order.
        proportions_D: In force until now; they sum to at most 1.
        losses_D: Nats a token, finite.
        references_D: Reference losses, nats a token.
        prior_D: The recipe's proportions; they sum to at most 1.
        memory: What the rule remembered at the last update; empty at first.
        update: 1 for the first update of a phase.
        step: The optimiser step after which the new proportions hold.
        config: The whole mixture section of the recipe.
    """

    domains: tuple[str, ...]
    proportions_D: np.ndarray
    losses_D: np.ndarray
    references_D: np.ndarray
    prior_D: np.ndarray
    memory: Mapping[str, Any]
    update: int
    step: int
    config: MixtureConfig

    @property
    def excess_D(self) -> np.ndarray:  # noqa: N802 - a shape suffix
        """Loss above the reference, nats a token; negative below it."""
        return self.losses_D - self.references_D


@dataclass(frozen=True)
class Ruling:
    """What a rule decides: weights [D] of any positive sum, and what it wants to remember, as JSON values."""

    weights_D: Any
    memory: Memory = field(default_factory=dict)


Rule = Callable[[Situation], Ruling]


def rule_on(situation: Situation) -> Ruling:
    """What the configured rule decides, its weights made to sum to 1.

    Raises UserError where a rule of the user's cannot be imported, fails, or returns no weights.
    """
    name = situation.config.rule
    if not situation.config.is_path:
        ruling = RULES[name](situation)
        return Ruling(normalised(ruling.weights_D), ruling.memory)
    function = import_rule(name)
    try:
        given = function(situation)
    except Exception as error:
        raise UserError(
            f"mixture.rule = {name} failed at step {situation.step}: {type(error).__name__}: {error}"
        ) from error
    ruling = given if isinstance(given, Ruling) else Ruling(given, dict(situation.memory))
    try:
        weights_D = np.asarray(ruling.weights_D, dtype=np.float64)
    except (TypeError, ValueError):
        weights_D = np.array([])
    wanted = (len(situation.domains),)
    if weights_D.shape != wanted or not np.isfinite(weights_D).all() or (weights_D < 0).any() or weights_D.sum() <= 0:
        raise UserError(
            f"mixture.rule = {name} returned {ruling.weights_D!r} at step {situation.step}; needed: {wanted[0]} "
            f"weights, one for each of {', '.join(situation.domains)}, finite, none negative, not all 0."
        )
    return Ruling(normalised(weights_D), ruling.memory)


def start_weights(config: MixtureConfig, prior_D: np.ndarray) -> np.ndarray:
    """The proportions before any loss is known: the prior, unless the rule has proportions of its own."""
    if config.rule == "uniform":
        return np.full_like(prior_D, 1 / len(prior_D))
    return tempered(prior_D, config.temperature) if config.rule == "temperature" else normalised(prior_D)


def tempered(prior_D: np.ndarray, temperature: float) -> np.ndarray:
    """prior^(1/T), normalised: T = 1 is the prior, a large T equal shares (arXiv 1907.05019, section 4.2)."""
    log_D = np.log(np.maximum(prior_D, SMALLEST_WEIGHT)) / temperature
    return normalised(np.exp(log_D - log_D.max()))


def chi_square_ball(centre_D: np.ndarray, excess_D: np.ndarray, rho: float, smallest_ratio: float) -> np.ndarray:
    """The q that maximises sum q * excess with 1/2 sum centre (q/centre - 1)^2 <= rho and q >= ratio * centre.

    q = centre * max((excess - eta) / lambda, ratio); for each eta one lambda makes it sum to 1, and eta is found by
    bisection (DRPruning, arXiv 2411.14055, which scales q anew after the ratio; here the ratio holds exactly). Adding
    the same number to every excess changes nothing. `centre_D` sums to 1.
    """
    above_D = excess_D - excess_D.min()
    largest = float(above_D.max())
    if largest <= SMALLEST_WEIGHT:
        return centre_D.copy()

    def tilted(eta: float) -> np.ndarray:
        weights_D = centre_D * np.maximum(above_D - eta, 0)
        return project(weights_D / weights_D.max(), smallest_ratio * centre_D, 1.0)

    def radius(q_D: np.ndarray) -> float:
        return 0.5 * float((centre_D * (q_D / centre_D - 1) ** 2).sum())

    low, high = -largest / (math.sqrt(2 * rho + 1) - 1), largest * (1 - 1e-9)
    if radius(tilted(high)) <= rho:
        return tilted(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(tilted(middle)) <= rho else (low, middle)
    return tilted(low)


def project(
    weights_D: np.ndarray, floor: float | np.ndarray, cap: float | np.ndarray, total: float = 1.0
) -> np.ndarray:
    """The point of {floor <= w <= cap, sum w = total} nearest to `weights_D` by relative entropy.

    It is clip(s * weights, floor, cap) with the one scale s that gives the sum; found exactly at the breakpoints of
    that piecewise linear function of s. Both bounds hold exactly; each is one number or one a domain. Where they leave
    no such point, the bound that is in the way is scaled to the total.
    """
    weights_D = np.maximum(weights_D, SMALLEST_WEIGHT)
    floor_D, cap_D = np.broadcast_to(floor, weights_D.shape), np.broadcast_to(cap, weights_D.shape)
    if 0 < floor_D.sum() >= total:
        return floor_D * (total / floor_D.sum())
    if cap_D.sum() <= total:
        return cap_D * (total / cap_D.sum())
    breakpoints = np.sort(np.concatenate([floor_D / weights_D, cap_D / weights_D]))
    sums = np.array([np.clip(scale * weights_D, floor_D, cap_D).sum() for scale in breakpoints])
    above = min(int(np.searchsorted(sums, total)), len(breakpoints) - 1)
    middle = (breakpoints[max(above - 1, 0)] + breakpoints[above]) / 2
    at_floor_D, at_cap_D = middle * weights_D <= floor_D, middle * weights_D >= cap_D
    free_D = ~(at_floor_D | at_cap_D)
    if not free_D.any():
        return np.clip(breakpoints[above] * weights_D, floor_D, cap_D)
    rest = total - float(floor_D[at_floor_D].sum()) - float(cap_D[at_cap_D].sum())
    return np.clip(weights_D * (rest / weights_D[free_D].sum()), floor_D, cap_D)


def normalised(weights_D: np.ndarray) -> np.ndarray:
    """The same weights with sum 1."""
    return weights_D / weights_D.sum()


def _sheared(situation: Situation) -> Ruling:
    """Sheared LLaMA, Algorithm 1: w_previous * exp(max(loss - reference, 0))."""
    return Ruling(_reweighted(situation.proportions_D, np.maximum(situation.excess_D, 0)))


def _sheared_unclipped(situation: Situation) -> Ruling:
    """Its released code: (1 - c) softmax(log w_previous + loss - reference) + c / k."""
    weights_D = _reweighted(situation.proportions_D, situation.excess_D)
    return Ruling((1 - SMOOTHING) * weights_D + SMOOTHING / len(weights_D))


def _dro(situation: Situation) -> Ruling:
    """The worst mixture near a centre that follows slowly: from the centre anew each time, so it cannot run away."""
    options: DroConfig = situation.config.dro
    prior_D, remembered = situation.prior_D, situation.memory.get("centre", {})
    centre_D = np.array([remembered.get(d, p) for d, p in zip(situation.domains, prior_D, strict=True)])
    share = float(centre_D.sum())
    weights_D = chi_square_ball(centre_D / share, situation.excess_D, options.rho, options.smallest_ratio)
    moved_D = (1 - options.centre_step) * centre_D + options.centre_step * share * weights_D
    lowest_D, highest_D = prior_D / options.centre_factor, prior_D * options.centre_factor
    moved_D = project(moved_D, lowest_D, highest_D, total=share)
    return Ruling(weights_D, {"centre": dict(remembered) | _named(situation.domains, moved_D)})


def _exp3(situation: Situation) -> Ruling:
    """Online data mixing (arXiv 2312.02406): a bandit whose reward is the loss; equal shares for K ln K updates.

    R += (loss / 10) / proportion; then (1 - K e_t) softmax(e_(t-1) R) + e_t with e_t = min(1/K, sqrt(ln K / (K t))).
    """
    count, t = len(situation.domains), situation.update
    before = situation.memory.get("rewards", {})
    gained_D = situation.losses_D / EXP3_LOSS_SCALE / np.maximum(situation.proportions_D, SMALLEST_WEIGHT)
    rewards_D = np.array([before.get(d, 0.0) for d in situation.domains]) + gained_D
    explore, explored = _exploration(count, t), _exploration(count, t - 1)
    weights_D = (1 - count * explore) * _reweighted(np.ones(count), explored * rewards_D) + explore
    return Ruling(weights_D, {"rewards": dict(before) | _named(situation.domains, rewards_D)})


def _exploration(count: int, t: int) -> float:
    return min(1 / count, math.sqrt(math.log(count) / (count * t))) if t > 0 and count > 1 else 1 / count


def _still(situation: Situation) -> Ruling:
    return Ruling(start_weights(situation.config, situation.prior_D))


RULES: dict[str, Rule] = {
    "static": _still,
    "uniform": _still,
    "temperature": _still,
    "sheared": _sheared,
    "sheared_unclipped": _sheared_unclipped,
    "dro": _dro,
    "exp3": _exp3,
}


def _reweighted(before_D: np.ndarray, exponent_D: np.ndarray) -> np.ndarray:
    """w * exp(exponent), normalised, in logarithms: an exponent of 1000 nats must not overflow."""
    log_D = np.log(np.maximum(before_D, SMALLEST_WEIGHT)) + exponent_D
    return normalised(np.exp(log_D - log_D.max()))


def _named(domains: tuple[str, ...], values_D: np.ndarray) -> dict[str, float]:
    return {domain: float(value) for domain, value in zip(domains, values_D, strict=True)}
