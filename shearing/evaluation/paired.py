"""Two models on the same sequences: how far apart their losses are, and whether that is more than chance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LossesOfSequences = Mapping[str, Sequence[float]]
"""Domain -> nats a token of each sequence."""


@dataclass(frozen=True)
class Difference:
    """Mean loss of one model less that of another, and the standard error that the choice of sequences gives it."""

    nats: float
    standard_error: float

    @property
    def is_noise(self) -> bool:
        """Whether it is not more than two standard errors; so too where the error is not known."""
        return not abs(self.nats) > 2 * self.standard_error


def paired_difference(losses: LossesOfSequences, others: LossesOfSequences) -> Difference:
    """How much higher the first model's mean loss is, sequence by sequence: what makes a text hard drops out.

    The mean over domains counts every domain the same, and so does its error: the root of the sum over K domains of
    s_k^2 / n_k, over K, where s_k is the standard deviation of the n_k differences of a domain. A domain of one
    sequence has no deviation, so the error is then not a number.

    Args:
        losses: Of one model.
        others: Of another, on the same sequences in the same order.
    """
    means, variances = [], []
    for domain, of_domain in losses.items():
        differences = np.subtract(of_domain, others[domain])
        means.append(float(differences.mean()))
        variances.append(float(differences.var(ddof=1)) / len(differences) if len(differences) > 1 else math.nan)
    return Difference(sum(means) / len(means), math.sqrt(sum(variances)) / len(means))
