"""Dynamic batch loading: how held-out losses move the proportions of the mixture.

Source: Sheared LLaMA (arXiv 2310.06694), Algorithm 1, and its released code. All functions are pure.
Shape suffix: D domains.
"""

import math
from collections.abc import Callable

import numpy as np
from pydantic import Field

from shearing.config import Config
from shearing.data.config import MixtureConfig
from shearing.errors import UserError
from shearing.storage import Store

SMOOTHING = 1e-4
"""c of the released code: this share of each update is spread evenly."""

SMALLEST_WEIGHT = 1e-12

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class MixtureState(Config):
    """One version of the proportions and what led to it.

    `step` is the optimiser step after which it holds. `losses` in nats a token; None where the loss was not finite.
    `warnings` are those of this version only.
    """

    version: int
    step: int
    proportions: dict[str, float]
    losses: dict[str, float | None] = Field(default_factory=dict)
    references: dict[str, float] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


def initial_state(config: MixtureConfig, prior: dict[str, float], step: int = 0) -> MixtureState:
    """Version 0: the prior (for the rule `uniform`, equal shares) within floor and cap.

    Raises UserError where no proportions can satisfy floor and cap.
    """
    check_bounds(config, len(prior))
    prior_D = _normalised(np.array(list(prior.values()), dtype=np.float64))
    start_D = np.full_like(prior_D, 1 / len(prior_D)) if config.rule == "uniform" else prior_D
    bounded_D = project(start_D, config.floor, config.cap)
    return MixtureState(version=0, step=step, proportions=_named(list(prior), bounded_D))


def next_state(
    state: MixtureState,
    losses: dict[str, float],
    references: dict[str, float],
    config: MixtureConfig,
    prior: dict[str, float],
    *,
    step: int,
) -> MixtureState:
    """The version after `state`, from the losses of an evaluation at `step`. All losses in nats a token.

    A domain whose loss is not finite keeps its proportion, with a warning; the others share the rest by the rule.
    Among these: the rule's proportions, then the pull to the prior, then the nearest proportions within floor and cap
    (nearest by relative entropy: ratios between domains that touch no bound are kept).
    """
    domains = list(state.proportions)
    for name, given in (("losses", losses), ("references", references), ("prior", prior)):
        assert set(given) == set(domains), f"{name} of {sorted(given)} for domains {sorted(domains)}"
    before_D = np.array([state.proportions[d] for d in domains])
    loss_D = np.array([losses[d] for d in domains], dtype=np.float64)
    reference_D = np.array([references[d] for d in domains], dtype=np.float64)
    prior_D = _normalised(np.array([prior[d] for d in domains], dtype=np.float64))
    known_D = np.isfinite(loss_D - reference_D)
    after_D = before_D.copy()
    if known_D.any():
        share = 1.0 - float(before_D[~known_D].sum())
        ruled_D = RULES[config.rule](before_D[known_D], loss_D[known_D] - reference_D[known_D], prior_D[known_D])
        pulled_D = (1 - config.prior_pull) * ruled_D + config.prior_pull * _normalised(prior_D[known_D])
        after_D[known_D] = project(pulled_D * share, config.floor, config.cap, total=share)
    return MixtureState(
        version=state.version + 1,
        step=step,
        proportions=_named(domains, after_D),
        losses={d: float(loss) if np.isfinite(loss) else None for d, loss in zip(domains, loss_D, strict=True)},
        references={d: references[d] for d in domains},
        warnings=[
            f"domain {d}: its loss is {losses[d]} (reference {references[d]}); it keeps its proportion {p:.4f}"
            for d, known, p in zip(domains, known_D, before_D, strict=True)
            if not known
        ],
    )


def check_bounds(config: MixtureConfig, domains: int) -> None:
    """Raise UserError where floor and cap leave no proportions that add up to 1."""
    problems = []
    if config.floor * domains > 1 + 1e-12:
        problems.append(
            f"mixture.floor = {config.floor} for each of {domains} domains is more than 1 in all; allowed: up to "
            f"{1 / domains:.6g}. Set mixture.floor={math.floor(1e4 / domains) / 1e4:g}."
        )
    if config.cap * domains < 1 - 1e-12:
        problems.append(
            f"mixture.cap = {config.cap} for each of {domains} domains is less than 1 in all; allowed: from "
            f"{1 / domains:.6g}. Set mixture.cap={math.ceil(1e4 / domains) / 1e4:g}."
        )
    if problems:
        raise UserError(problems)


def project(weights_D: np.ndarray, floor: float, cap: float, total: float = 1.0) -> np.ndarray:
    """The point of {floor <= w <= cap, sum w = total} nearest to `weights_D` by relative entropy.

    It is clip(s * weights, floor, cap) with the one scale s that gives the sum; found exactly at the breakpoints of
    that piecewise linear function of s. Both bounds hold exactly. The set must not be empty.
    """
    weights_D = np.maximum(weights_D, SMALLEST_WEIGHT)
    if len(weights_D) * floor >= total:
        return np.full_like(weights_D, total / len(weights_D))
    if len(weights_D) * cap <= total:
        return np.full_like(weights_D, total / len(weights_D))
    breakpoints = np.sort(np.concatenate([floor / weights_D, cap / weights_D]))
    sums = np.array([np.clip(scale * weights_D, floor, cap).sum() for scale in breakpoints])
    above = min(int(np.searchsorted(sums, total)), len(breakpoints) - 1)
    middle = (breakpoints[max(above - 1, 0)] + breakpoints[above]) / 2
    at_floor_D, at_cap_D = middle * weights_D <= floor, middle * weights_D >= cap
    free_D = ~(at_floor_D | at_cap_D)
    if not free_D.any():
        return np.clip(breakpoints[above] * weights_D, floor, cap)
    rest = total - floor * at_floor_D.sum() - cap * at_cap_D.sum()
    return np.clip(weights_D * (rest / weights_D[free_D].sum()), floor, cap)


def _sheared(before_D: np.ndarray, excess_D: np.ndarray, _prior_D: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper: w_previous * exp(max(loss - reference, 0))."""
    return _reweighted(before_D, np.maximum(excess_D, 0))


def _sheared_unclipped(before_D: np.ndarray, excess_D: np.ndarray, _prior_D: np.ndarray) -> np.ndarray:
    """The released code: (1 - c) softmax(log w_previous + loss - reference) + c / k."""
    return (1 - SMOOTHING) * _reweighted(before_D, excess_D) + SMOOTHING / len(before_D)


def _static(_before_D: np.ndarray, _excess_D: np.ndarray, prior_D: np.ndarray) -> np.ndarray:
    return _normalised(prior_D)


def _uniform(before_D: np.ndarray, _excess_D: np.ndarray, _prior_D: np.ndarray) -> np.ndarray:
    return np.full_like(before_D, 1 / len(before_D))


RULES: dict[str, Rule] = {
    "sheared": _sheared,
    "sheared_unclipped": _sheared_unclipped,
    "static": _static,
    "uniform": _uniform,
}


def _reweighted(before_D: np.ndarray, exponent_D: np.ndarray) -> np.ndarray:
    """w * exp(exponent), normalised, in logarithms: an exponent of 1000 nats must not overflow."""
    log_D = np.log(np.maximum(before_D, SMALLEST_WEIGHT)) + exponent_D
    return _normalised(np.exp(log_D - log_D.max()))


def _normalised(weights_D: np.ndarray) -> np.ndarray:
    return weights_D / weights_D.sum()


def _named(domains: list[str], values_D: np.ndarray) -> dict[str, float]:
    return {d: float(value) for d, value in zip(domains, values_D, strict=True)}


class Decision(Config):
    """One version as written to the workspace: the state, and which attempt of how many workers it was made for."""

    state: MixtureState
    attempt: str
    world: int


def write_decision(folder: Store, decision: Decision) -> None:
    """Write one version as `<version>.json`; later versions, left by an abandoned attempt, go first."""
    for name in folder.list():
        if name.endswith(".json") and int(name.removesuffix(".json")) > decision.state.version:
            folder.delete(name)
    folder.write_json(f"{decision.state.version:06d}.json", decision.model_dump(mode="json"))


def read_decisions(folder: Store) -> list[Decision]:
    """All versions in order; empty where none was made yet."""
    return [Decision.model_validate(folder.read_json(n)) for n in folder.list() if n.endswith(".json")]
