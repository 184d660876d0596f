"""Dynamic batch loading: how losses move the proportions of the mixture, and how decisions are kept and replayed.

Source: Sheared LLaMA (arXiv 2310.06694), Algorithm 1; the rules stand in `mixture_rules`. All functions but those
that write and read decisions are pure. Shape suffix: D domains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from shearing.config import Config
from shearing.data.config import MixtureConfig
from shearing.data.mixture_rules import Ruling, Situation, normalised, project, rule_on, start_weights
from shearing.errors import UserError
from shearing.storage import Store

REPLAY_TOLERANCE = 1e-9
"""Another machine's exp and log may differ in the last bit; a decision on other losses differs by far more."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class MixtureState(Config):
    """One version of the proportions and what led to it.

    `step` is the optimiser step after which it holds. `losses` in nats a token; None where there was none, or none
    that was finite. `memory` is the rule's own. `warnings` are those of this version only.
    """

    version: int
    step: int
    proportions: dict[str, float]
    losses: dict[str, float | None] = Field(default_factory=dict)
    references: dict[str, float] = Field(default_factory=dict)
    memory: dict[str, dict[str, Finite] | list[Finite] | Finite] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


def initial_state(config: MixtureConfig, prior: Mapping[str, float], step: int = 0) -> MixtureState:
    """Version 0: the prior (`uniform`: equal shares; `temperature`: the tempered prior) within floor and cap.

    Raises UserError where no proportions can satisfy floor and cap.
    """
    check_bounds(config, len(prior))
    prior_D = normalised(np.array(list(prior.values()), dtype=np.float64))
    bounded_D = _bounded(start_weights(config, prior_D), prior_D, config)
    return MixtureState(version=0, step=step, proportions=_named(list(prior), bounded_D))


def next_state(
    state: MixtureState,
    losses: Mapping[str, float | None],
    references: Mapping[str, float],
    config: MixtureConfig,
    prior: Mapping[str, float],
    *,
    step: int,
) -> MixtureState:
    """The version after `state`, from the losses known at `step`. All losses in nats a token.

    A domain without a loss (None: nothing of it was measured), or whose loss is not finite, keeps its proportion, with
    a warning; the others share the rest by the rule. Among these: the rule's proportions, then the pull to the prior,
    then the nearest proportions within floor and cap (nearest by relative entropy: ratios between domains that touch
    no bound are kept). Raises UserError where a rule of the user's fails.
    """
    domains = list(state.proportions)
    for name, given in (("losses", losses), ("references", references), ("prior", prior)):
        assert set(given) == set(domains), f"{name} of {sorted(given)} for domains {sorted(domains)}"
    before_D = np.array([state.proportions[d] for d in domains])
    loss_D = np.array([losses[d] for d in domains], dtype=np.float64)  # None becomes NaN
    reference_D = np.array([references[d] for d in domains], dtype=np.float64)
    prior_D = normalised(np.array([prior[d] for d in domains], dtype=np.float64))
    known_D = np.isfinite(loss_D - reference_D)
    after_D, memory = before_D.copy(), state.memory
    if known_D.any():
        situation = Situation(
            domains=tuple(d for d, known in zip(domains, known_D, strict=True) if known),
            proportions_D=before_D[known_D],
            losses_D=loss_D[known_D],
            references_D=reference_D[known_D],
            prior_D=prior_D[known_D],
            memory=state.memory,
            update=state.version + 1,
            step=step,
            config=config,
        )
        ruling: Ruling = rule_on(situation)
        share, memory = 1.0 - float(before_D[~known_D].sum()), ruling.memory
        after_D[known_D] = _bounded(ruling.weights_D, prior_D[known_D], config, total=share)
    try:
        return MixtureState(
            version=state.version + 1,
            step=step,
            proportions=_named(domains, after_D),
            losses={d: float(loss) if np.isfinite(loss) else None for d, loss in zip(domains, loss_D, strict=True)},
            references={d: references[d] for d in domains},
            memory=memory,
            warnings=[
                _kept(d, losses[d], references[d], state.proportions[d])
                for d, known in zip(domains, known_D, strict=True)
                if not known
            ],
        )
    except ValidationError as error:
        raise UserError(
            f"mixture.rule = {config.rule} wants to remember {memory!r}; allowed: names with a finite number, a list "
            f"of them, or a mapping of names to them ({error.errors()[0]['msg']})."
        ) from None


def _bounded(weights_D: np.ndarray, prior_D: np.ndarray, config: MixtureConfig, total: float = 1.0) -> np.ndarray:
    """Proportions pulled to the prior and held within floor and cap, with the sum `total`."""
    pulled_D = (1 - config.prior_pull) * weights_D + config.prior_pull * normalised(prior_D)
    return project(pulled_D * total, config.floor, config.cap, total=total)


def _kept(domain: str, loss: float | None, reference: float, proportion: float) -> str:
    if loss is None:
        return (
            f"domain {domain}: nothing of it was read since the last update; it keeps its proportion {proportion:.4f}"
        )
    return f"domain {domain}: its loss is {loss} (reference {reference}); it keeps its proportion {proportion:.4f}"


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


@dataclass(frozen=True)
class Replay:
    """What replaying a history came to: how many versions, and the first that differs, if any, and how."""

    versions: int
    differs_at: int | None = None
    how: str = ""

    @property
    def equal(self) -> bool:
        """Whether every version came out again."""
        return self.differs_at is None


def replay(states: list[MixtureState], config: MixtureConfig, prior: Mapping[str, float]) -> Replay:
    """Decide every version again from the recorded losses and references, and compare.

    Each version is made from the one before it as made here, so that what differs first is what was changed. Raises
    UserError where a rule of the user's cannot be imported or fails.
    """
    made: MixtureState | None = None
    for number, recorded in enumerate(states):
        if made is None:
            made = initial_state(config, prior, step=recorded.step)
        elif set(recorded.losses) != set(made.proportions) or set(recorded.references) != set(made.proportions):
            return Replay(len(states), number, "losses or references of other domains were recorded")
        else:
            made = next_state(made, recorded.losses, recorded.references, config, prior, step=recorded.step)
        if how := _difference(recorded, made):
            return Replay(len(states), number, how)
    return Replay(len(states))


def _difference(recorded: MixtureState, made: MixtureState) -> str:
    """How a recorded version differs from the one made anew; nothing where it does not."""
    if recorded.version != made.version:
        return f"version {recorded.version} stands where version {made.version} belongs"
    if set(recorded.proportions) != set(made.proportions):
        return f"it has the domains {', '.join(recorded.proportions)}, not {', '.join(made.proportions)}"
    gaps = {d: abs(recorded.proportions[d] - p) for d, p in made.proportions.items()}
    worst = max(gaps, key=lambda domain: gaps[domain])
    if gaps[worst] > REPLAY_TOLERANCE:
        return f"{worst} was given {recorded.proportions[worst]:.6f}; its losses give {made.proportions[worst]:.6f}"
    if not _same(recorded.memory, made.memory):
        return "what the rule remembered is not what its losses give"
    return ""


def _same(one: object, other: object) -> bool:
    """Whether two memories are equal but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=REPLAY_TOLERANCE, abs_tol=REPLAY_TOLERANCE)
    return False
