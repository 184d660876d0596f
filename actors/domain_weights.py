"""Proportions of the mixture, decided once for all ranks from the losses that they measured together."""

import asyncio
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.tasks import task_result
from shearing.data.config import MixtureConfig
from shearing.data.mixture import Decision, MixtureState, initial_state, next_state, read_decisions, write_decision
from shearing.data.rule_by_path import import_rule
from shearing.errors import UserError
from shearing.storage import open_store

logger = logging.getLogger(__name__)

MOST_RANKS = 2**16
"""Calls that wait in the actor at once. Ray's own limit is 1,000: of 1,024 ranks the last 24 would never be heard."""

LossSums = Mapping[str, tuple[float, float]]


class CollectionError(RuntimeError):
    """The ranks of one evaluation do not fit together, or a newer attempt took their place."""


@dataclass
class _Collection:
    """What the ranks of one evaluation handed in so far."""

    world: int
    base: MixtureState
    answer: "asyncio.Future[MixtureState]"
    sums: dict[int, LossSums] = field(default_factory=dict)


class DomainWeights:
    """Collects an evaluation from all ranks, applies the rule once and gives every rank the same new version.

    A plain class; `start_domain_weights` makes it a named actor. It may be killed at any moment: ranks hand in the
    version that they hold, and each decision is written to `folder_uri` before anyone hears of it, so made anew it
    answers those who ask again.
    """

    def __init__(
        self, folder_uri: str, config: MixtureConfig, prior: dict[str, float], references: dict[str, float]
    ) -> None:
        self.config = config
        self.prior = prior
        self.references = references
        self._folder = open_store(folder_uri)
        self._decisions = {d.state.version: d for d in read_decisions(self._folder)}
        self._collections: dict[tuple[int, str], _Collection] = {}
        if not self._decisions:
            self._record(Decision(state=initial_state(config, prior), attempt="", world=0))

    def problems(self) -> list[str]:
        """What keeps this actor from deciding: a rule of the user's that cannot be imported where it runs."""
        try:
            if self.config.is_path:
                import_rule(self.config.rule)
        except UserError as error:
            return error.problems
        return []

    async def submit(
        self, step: int, rank: int, world: int, *, attempt: str, base: MixtureState, sums: LossSums
    ) -> MixtureState:
        """Hand in one rank's share of the losses at `step`; returns the next version once all ranks have.

        `sums` holds a domain's summed loss in nats and how many tokens (or sequences of one length, with the sum of
        their mean losses) it is summed over, for this rank's share only. `base` is the version that the rank holds.
        `attempt` names one life of the worker group, the same on all its ranks. Handing in the same share again is
        harmless. Raises CollectionError where ranks disagree or a newer attempt decided, UserError where a rule of the
        user's fails, OSError where the decision cannot be written: then nothing was decided.
        """
        decided = self._decisions.get(base.version + 1)
        if decided is not None and (decided.state.step, decided.attempt) == (step, attempt):
            return decided.state
        key = (step, attempt)
        if key not in self._collections:
            self._collections[key] = _Collection(world, base, asyncio.get_running_loop().create_future())
        collection = self._collections[key]
        problem = _misfit(collection, step, rank, world, base)
        if problem and not collection.answer.done():
            collection.answer.set_exception(CollectionError(problem))
        if not collection.answer.done():
            collection.sums[rank] = sums
            if len(collection.sums) == world:
                self._decide(step, attempt, collection)
        return await asyncio.shield(collection.answer)

    def state(self) -> MixtureState:
        """The latest version."""
        return self._decisions[max(self._decisions)].state

    def history(self) -> list[MixtureState]:
        """All versions that hold, in order; those of an abandoned attempt left out."""
        return [self._decisions[version].state for version in sorted(self._decisions)]

    def process_id(self) -> int:
        """Of the process that this actor lives in, for fault drills."""
        return os.getpid()

    def _decide(self, step: int, attempt: str, collection: _Collection) -> None:
        losses = domain_losses(self.prior, [collection.sums[rank] for rank in sorted(collection.sums)])
        try:
            state = next_state(collection.base, losses, self.references, self.config, self.prior, step=step)
            self._record(Decision(state=state, attempt=attempt, world=collection.world))
        except (UserError, OSError) as error:  # every rank has to hear of it, or the others wait for ever
            collection.answer.set_exception(error)
            del self._collections[step, attempt]  # ranks that hand in again are to be tried again
            return
        collection.answer.set_result(state)
        for (_, other), pending in self._collections.items():
            if other != attempt and not pending.answer.done():
                pending.answer.set_exception(CollectionError(f"attempt {other} was followed by attempt {attempt}"))
                pending.answer.exception()  # its ranks may be gone: nobody need ask
        self._collections = {key: c for key, c in self._collections.items() if not c.answer.done()}
        _log(state)

    def _record(self, decision: Decision) -> None:
        write_decision(self._folder, decision)
        version = decision.state.version
        self._decisions = {v: d for v, d in self._decisions.items() if v < version} | {version: decision}


def domain_losses(domains: Iterable[str], shares: list[LossSums]) -> dict[str, float | None]:
    """Mean loss in nats a token over the ranks' shares; None for a domain of which no rank saw a token."""
    losses: dict[str, float | None] = {}
    for domain in domains:
        tokens = math.fsum(share.get(domain, (0.0, 0))[1] for share in shares)
        nats = sum(share.get(domain, (0.0, 0))[0] for share in shares)
        losses[domain] = nats / tokens if tokens > 0 else None
    return losses


def _misfit(collection: _Collection, step: int, rank: int, world: int, base: MixtureState) -> str | None:
    """What is wrong between a rank's share and those handed in before, if anything."""
    if world != collection.world or not 0 <= rank < world:
        return f"step {step}: rank {rank} says there are {world} ranks; the ranks before it said {collection.world}"
    if base != collection.base:
        others = ", ".join(map(str, sorted(collection.sums)))
        return (
            f"step {step}: rank {rank} holds version {base.version} of the proportions, {base.proportions}, but "
            f"ranks {others} hold version {collection.base.version}, {collection.base.proportions}. All ranks have to "
            f"go on from the same checkpoint."
        )
    return None


def _log(state: MixtureState) -> None:
    shares = ", ".join(f"{domain} {proportion:.3f}" for domain, proportion in state.proportions.items())
    logger.info("step %d: proportions, version %d: %s", state.step, state.version, shares)
    for warning in state.warnings:
        logger.warning("step %d: %s", state.step, warning)


def start_domain_weights(
    name: str, folder_uri: str, config: MixtureConfig, prior: dict[str, float], references: dict[str, float]
) -> Any:
    """The actor of that name, made if there is none; it costs no CPU slot and is restarted for ever."""
    import ray

    actor: Any = ray.remote(DomainWeights)
    options = {"name": name, "get_if_exists": True, "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return actor.options(**options, max_concurrency=MOST_RANKS).remote(folder_uri, config, prior, references)


class DomainWeightsClient:
    """How one rank of one worker group talks to the actor."""

    def __init__(self, actor: Any, rank: int, world: int, attempt: str) -> None:
        self.actor = actor
        self.rank, self.world, self.attempt = rank, world, attempt

    def submit(self, step: int, base: MixtureState, sums: LossSums) -> MixtureState:
        """Hand in this rank's share and wait for the version that all ranks get.

        Raises UserError where a rule of the user's fails.
        """
        answer = self.actor.submit.remote(step, self.rank, self.world, attempt=self.attempt, base=base, sums=dict(sums))
        state: MixtureState = task_result(answer)
        return state
