"""One constraint on all prunable parameters together (CoFi, arXiv 2204.00408), in place of a target shape.

A parameter survives when every gate over it does: hidden times head times attention layer, hidden times intermediate
times MLP layer. Gates are independent, so the expected number of survivors is a sum of products of sums; no outer
product is formed. Shape suffixes: L layers, X units of a row.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shearing.pruning.budget import INSIDE, OverallBudget, left_in_layer

OVERALL = "overall"


class OverallSparsity(OverallBudget):
    """Counts the prunable parameters that gates leave, and chooses gates that leave no more than asked."""

    def count(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Parameters left by gates, a scalar in float64: expected ones from P(z > 0), true ones from 0 and 1.

        Args:
            gates: By group, [L, X] or [X]; a group left out is all open. Differentiable.
        """
        layers = torch.ones(self.shape.num_layers, dtype=torch.float64)

        def units(name: str, size: int) -> Tensor:
            if name not in gates:
                return layers * size
            open_LX = gates[name].double().cpu()
            return open_LX.sum(-1) if open_LX.ndim == 2 else open_LX

        hidden = gates["hidden"].sum(dtype=torch.float64).cpu() if "hidden" in gates else self.shape.hidden_size
        left_L: Tensor = left_in_layer(self.shape, self.costs, hidden, units)
        return left_L.sum() + self.outside[0] * hidden + self.outside[1]

    def expected(self, open_p: Mapping[str, Tensor]) -> Tensor:
        """Expected sparsity over all parameters that count, a scalar; differentiable in P(z > 0) of every gate."""
        return 1 - self.count(open_p) / self.total

    def choose(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gates that stay at exactly the sparsity asked for, True for open; the count is at or under `budget`.

        Units close from the smallest score on, over all groups together, until the budget holds. Then, from the
        largest score on, what closed is opened again where it still fits, so that no single unit more would fit. A
        layer's attention or MLP without a unit left closes, and units inside a closed one close with it; of one that
        is forced to stay the best unit stays. Of equal scores the later unit closes first. One hidden dimension stays
        whatever its score.

        Args:
            scores: By group, comparable over groups; infinite where a unit is forced to stay or go.
        """
        gates = {name: torch.ones(score.shape, dtype=torch.float64) for name, score in scores.items()}
        scores = _with_content(scores)
        ordered = list(_ascending(scores))
        closed, count = [], _Count(self, gates)
        for name, place, score in ordered:
            if score == math.inf or (count.left <= self.budget and score != -math.inf):
                break
            if name == "hidden" and gates[name].sum() == 1:
                continue
            count.close(name, place)
            closed.append((name, place, score))
        opened_again = [(name, place) for name, place, score in reversed(closed) if score != -math.inf]
        for name, place in opened_again:
            count.open_if_at_most(name, place, self.budget)
        before = count.left
        self._close_empty(gates)
        count = _Count(self, gates)
        if count.left < before:  # biases of empty half-layers are freed, in whose place units of others may fit
            for name, place in opened_again:
                if gates[name][place] == 0 and _inside_open_half(gates, name, place):
                    count.open_if_at_most(name, place, self.budget)
        return {name: gate > 0 for name, gate in gates.items()}

    def _close_empty(self, gates: dict[str, Tensor]) -> None:
        """Make half-layers and what is inside them agree; changes no function and no count but downwards."""
        for half, inside in INSIDE.items():
            if half not in gates:
                continue
            for name in inside:
                if name in gates:
                    gates[half] *= (gates[name].sum(-1) > 0).double()
            for name in inside:
                if name in gates:
                    gates[name] *= gates[half][:, None]


def _inside_open_half(gates: Mapping[str, Tensor], name: str, place: tuple[int, ...]) -> bool:
    """Whether a unit is a hidden dimension, or lies in a half-layer that stays; a half-layer itself does not."""
    if name == "hidden":
        return True
    return any(name in inside and (half not in gates or gates[half][place[0]] > 0) for half, inside in INSIDE.items())


def _with_content(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same scores, where the best unit inside each half-layer that is forced to stay is forced to stay."""
    found = {name: score.detach().double().clone() for name, score in scores.items()}
    for half, inside in INSIDE.items():
        for layer in (found[half] == math.inf).nonzero().flatten().tolist() if half in found else []:
            for name in inside:
                if name in found:
                    found[name][layer, found[name][layer].argmax()] = math.inf
    return found


def _ascending(scores: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Every unit of every group: group, place in its tensor, score; the smallest score first, later units before."""
    flat = torch.cat([score.detach().cpu().double().reshape(-1) for score in scores.values()])
    places = [
        (name, tuple(place)) for name, score in scores.items() for place in torch.ones(score.shape).nonzero().tolist()
    ]
    order = torch.argsort(flat.flip(0), stable=True)
    for number in (len(flat) - 1 - order).tolist():
        yield *places[number], float(flat[number])


class _Count:
    """The count of parameters while single gates change, at the cost of a layer a change."""

    def __init__(self, overall: OverallSparsity, gates: dict[str, Tensor]) -> None:
        self.shape, self.costs, self.outside, self.gates = overall.shape, overall.costs, overall.outside, gates
        self.sums = {name: gate.sum(-1).tolist() if gate.ndim == 2 else gate.tolist() for name, gate in gates.items()}
        self.hidden = float(sum(self.sums.pop("hidden", [1.0] * self.shape.hidden_size)))
        self.layers = [self._layer(layer) for layer in range(self.shape.num_layers)]
        self.left = self._sum()

    def close(self, name: str, place: tuple[int, ...]) -> None:
        """Close a gate."""
        self._change(name, place, -1.0)

    def open_if_at_most(self, name: str, place: tuple[int, ...], budget: int) -> None:
        """Open a gate unless that leaves more than `budget`."""
        self._change(name, place, 1.0)
        if self.left > budget:
            self._change(name, place, -1.0)

    def _change(self, name: str, place: tuple[int, ...], by: float) -> None:
        self.gates[name][place] += by
        if name == "hidden":
            self.hidden += by
            touched = range(self.shape.num_layers)
        else:
            self.sums[name][place[0]] += by
            touched = range(place[0], place[0] + 1)
        for layer in touched:
            self.layers[layer] = self._layer(layer)
        self.left = self._sum()

    def _sum(self) -> float:
        return sum(self.layers) + self.outside[0] * self.hidden + self.outside[1]

    def _layer(self, layer: int) -> float:
        def units(name: str, size: int) -> float:
            return self.sums[name][layer] if name in self.sums else float(size)

        left: float = left_in_layer(self.shape, self.costs, self.hidden, units)
        return left
