"""Which sequences make up a global batch: as many of each domain as the proportions ask for, and no dice."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shearing.errors import UserError


class Draw(NamedTuple):
    """One sequence of a batch: draw `index` of `domain`, in the order that SequenceOrder gives."""

    domain: str
    index: int  # type: ignore[assignment]  # the field's own name; nobody searches a Draw with tuple.index


class DomainExhausted(UserError):  # noqa: N818 - named for what happened
    """A domain has no unseen sequences left and the recipe says to stop there."""


@dataclass(frozen=True)
class MixState:
    """The position of training in its data, independent of the number of workers.

    `drawn` counts the sequences taken of each domain, through all epochs. `credit` is how many more were asked for
    than drawn, in sequences; it adds up to 0 over the domains.
    """

    credit: dict[str, float]
    drawn: dict[str, int]

    @classmethod
    def start(cls, domains: list[str]) -> "MixState":
        """Nothing drawn yet."""
        return cls(dict.fromkeys(domains, 0.0), dict.fromkeys(domains, 0))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MixState":
        """The inverse of `to_json`."""
        return cls(
            {str(d): float(c) for d, c in value["credit"].items()}, {str(d): int(n) for d, n in value["drawn"].items()}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON exactly."""
        return {"credit": dict(self.credit), "drawn": dict(self.drawn)}


def plan_batch(
    state: MixState, proportions: dict[str, float], sequences: int, seed: int, step: int
) -> tuple[list[Draw], MixState]:
    """The `sequences` draws of global batch `step`, and the state after it. Pure: every rank computes the same.

    Every domain gets the whole sequences that it is owed; what is left of the batch goes to the domains that would
    soonest be a whole sequence behind (earliest deadline first). While proportions stay the same, what was drawn is
    always within one sequence of what was asked for: the fractional schedule is a fractional matching of draws to
    batches, so a whole one exists, and earliest deadline first finds it. The same holds when they change as long as
    every domain is owed a sequence a batch. Otherwise a change can leave a rare domain behind by up to
    1 + 1/2 + ... + 1/domains for a while (no rule without foresight does better); none is ever a sequence ahead.

    The order inside the batch is shuffled, so that any rank's share is a fair sample: rank r takes `plan[r::world]`.
    """
    domains = list(state.drawn)
    assert set(proportions) == set(domains), f"proportions of {sorted(proportions)} for domains {sorted(domains)}"
    share_D = np.array([proportions[d] for d in domains]) * sequences
    owed_D = np.array([state.credit[d] for d in domains]) + share_D
    count_D = _apportion(owed_D, share_D, sequences)
    plan = [Draw(d, state.drawn[d] + i) for d, count in zip(domains, count_D, strict=True) for i in range(int(count))]
    order = np.random.default_rng((seed, step)).permutation(len(plan))
    after = MixState(
        {d: float(owed - count) for d, owed, count in zip(domains, owed_D, count_D, strict=True)},
        {d: state.drawn[d] + int(count) for d, count in zip(domains, count_D, strict=True)},
    )
    return [plan[i] for i in order], after


def _apportion(owed_D: np.ndarray, share_D: np.ndarray, sequences: int) -> np.ndarray:
    """Whole sequences a domain, adding up to `sequences`."""
    count_D = np.maximum(np.floor(owed_D), 0).astype(np.int64)
    left = sequences - int(count_D.sum())
    if left > 0:
        fraction_D = owed_D - count_D
        batches_left_D = np.where(fraction_D > 1e-9, (1 - fraction_D) / np.maximum(share_D, 1e-12), np.inf)
        count_D[np.argsort(batches_left_D, kind="stable")[:left]] += 1
    while left < 0:  # after a change of proportions more can be due than the batch holds
        most_patient = int(np.argmin(np.where(count_D > 0, owed_D - count_D, np.inf)))
        count_D[most_patient] -= 1
        left += 1
    return count_D


def require_unrepeated(after: MixState, sequences: dict[str, int], step: int) -> None:
    """For `mixture.on_exhausted: stop`: raise DomainExhausted if batch `step` needs a domain's next epoch.

    `sequences` are those that each domain holds.
    """
    short = [d for d, drawn in after.drawn.items() if drawn > sequences[d]]
    if short:
        raise DomainExhausted(
            [
                f"domain {d} ran out at step {step}: {after.drawn[d]} sequences are asked for in all, and it holds "
                f"{sequences[d]}. Set mixture.on_exhausted=next_epoch to repeat it, give it more text, lower its "
                f"proportion (mixture.cap bounds them all), or train fewer steps."
                for d in short
            ]
        )


@dataclass(frozen=True)
class EpochStart:
    """A domain starts to repeat: `epoch` counts from 0, so the first repetition is epoch 1."""

    domain: str
    epoch: int


def epoch_starts(before: MixState, after: MixState, sequences: dict[str, int]) -> list[EpochStart]:
    """The epochs that began between two states, the very first of each domain left out."""
    starts = []
    for domain, drawn in after.drawn.items():
        first = max(0, before.drawn[domain] - 1) // sequences[domain]
        last = max(0, drawn - 1) // sequences[domain]
        starts += [EpochStart(domain, epoch) for epoch in range(first + 1, last + 1)]
    return starts
