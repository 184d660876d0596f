"""Where a trainer gets its sequences: one protocol, so that it knows nothing of the engine that reads them.

Shape suffixes: N sequences, T tokens of a sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shearing.data.manifest import Manifest, Split
from shearing.data.mixing import Draw
from shearing.data.order import SequenceOrder
from shearing.errors import UserError

STEPS_A_REQUEST = 8
"""Batches that a trainer asks for at once where their proportions are settled: a request costs the source about 1.5 ms
(benchmarks/scaling.py actor), which for hundreds of ranks is longer than a step."""


@dataclass(frozen=True)
class Sequences:
    """Rows in the order asked: `tokens_NT` in the corpus's own integer type, `sequence_ids_N` int64."""

    tokens_NT: np.ndarray
    sequence_ids_N: np.ndarray


class SequenceSource(Protocol):
    """Serves any draws of any domains. The same draws give the same rows, always and from every implementation."""

    def fetch(self, draws: Sequence[Draw]) -> Sequences:
        """The rows of `draws`, in that order."""
        ...


def make_orders(manifest: Manifest, split: Split, domains: Iterable[str], seed: int) -> dict[str, SequenceOrder]:
    """The order of each domain. Raises UserError naming every domain that the corpus lacks or holds empty."""
    domains = list(domains)
    missing = [d for d in domains if split not in manifest.domains.get(d, {})]
    empty = [d for d in domains if d not in missing and manifest.domains[d][split].sequences == 0]
    problems = [
        f"domain {d} is not in the corpus's split {split}; it holds: {', '.join(sorted(manifest.domains))}. "
        f"Prepare the corpus with it, or take it out of the mixture."
        for d in missing
    ] + [
        f"domain {d} holds no sequences in split {split}; allowed: at least 1. Give it more text, or raise its "
        f"share in corpus.split."
        for d in empty
    ]
    if problems:
        raise UserError(problems)
    return {d: SequenceOrder(d, manifest.domains[d][split], seed) for d in domains}


def group_by_domain(draws: Sequence[Draw]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each domain the draw indices asked for, and the rows of the answer that they fill."""
    places: dict[str, tuple[list[int], list[int]]] = {}
    for row, (domain, index) in enumerate(draws):
        indices, rows = places.setdefault(domain, ([], []))
        indices.append(index)
        rows.append(row)
    return {d: (np.array(indices), np.array(rows)) for d, (indices, rows) in places.items()}
