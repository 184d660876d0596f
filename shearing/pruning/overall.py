"""One constraint on all prunable parameters together (CoFi, arXiv 2204.00408), in place of a target shape.

A parameter survives when every gate over it does: hidden times head times attention layer, hidden times intermediate
times MLP layer. Gates are independent, so the expected number of survivors is a sum of products of sums; no outer
product is formed. Shape suffixes: L layers, X units of a row.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shearing.models.family import family_of, has_bias, shape_of
from shearing.models.parameters import count_parameters, parameters_outside, prunable_parameters
from shearing.models.shape import Shape
from shearing.pruning.config import PruningTarget

OVERALL = "overall"
INSIDE = {"attention_layer": ("head", "kv_head"), "mlp_layer": ("intermediate",)}


@dataclass(frozen=True)
class UnitCosts:
    """Prunable parameters that a unit brings: for each hidden dimension, and for itself (its biases).

    Attributes:
        query: Of a query head: rows of its projection, columns of the output projection.
        query_bias: Its own biases.
        key_value: Of a key/value head.
        key_value_bias: Its own biases.
        intermediate: Of an intermediate unit.
        intermediate_bias: Its own biases.
        attention: Of a layer's attention: the output projection's bias.
        mlp: Of a layer's MLP: the down projection's bias.
    """

    query: int
    query_bias: int
    key_value: int
    key_value_bias: int
    intermediate: int
    intermediate_bias: int
    attention: int
    mlp: int

    @classmethod
    def of(cls, config: Any) -> "UnitCosts":
        """Those of a model, from its config alone."""
        family, size = family_of(config), shape_of(config).head_size
        halves = 1 if family.gate is None else 2
        qkv, output, mlp = (has_bias(family, config, t) for t in (family.qkv_bias, family.output_bias, family.mlp_bias))
        return cls(2 * size, qkv * size, 2 * size, 2 * qkv * size, halves + 1, mlp * halves, int(output), int(mlp))


class OverallSparsity:
    """Counts the prunable parameters that gates leave, and chooses gates that leave no more than asked.

    Args:
        config: Of the source model.
        sparsity: Share of the prunable parameters that goes.

    Attributes:
        total: Parameters of the source that count.
        budget: How many of them may stay.
        target_sparsity: The share that goes.
    """

    def __init__(self, config: Any, sparsity: float) -> None:
        self.shape: Shape = shape_of(config)
        self.costs = UnitCosts.of(config)
        self.outside = (0, 0)  # what counts beside the projections: a hidden dimension's, and the rest
        self.total = prunable_parameters(config)
        self.target_sparsity = sparsity
        self.budget = int(self.total * (1 - sparsity))
        assert int(self.count({})) == self.total

    @classmethod
    def of_all(cls, config: Any, parameters: int) -> "OverallSparsity":
        """The same over all parameters, so that at most `parameters` stay with embeddings, LM head and norms.

        What lies outside the projections follows the hidden size alone; norms of a half-layer that goes are counted
        as if they stayed.
        """
        found = cls(config, 0.0)
        hidden = found.shape.hidden_size
        each = parameters_outside(config, hidden) - parameters_outside(config, hidden - 1)
        found.outside = (each, parameters_outside(config, hidden) - each * hidden)
        found.total = count_parameters(config)
        found.budget = parameters
        found.target_sparsity = 1 - parameters / found.total
        assert int(found.count({})) == found.total
        return found

    @classmethod
    def asked(cls, config: Any, target: PruningTarget) -> "OverallSparsity":
        """By what a target gives that is no shape: a sparsity or a number of parameters."""
        if target.sparsity is not None:
            return cls(config, target.sparsity)
        assert target.parameters is not None
        return cls.of_all(config, target.parameters)

    def least(self, shapes: Mapping[str, tuple[int, ...]], kept_layers: tuple[int, ...]) -> int:
        """Parameters left when every gate that may close has closed; no `choose` gets below.

        Args:
            shapes: Of the tensors of gates, by group: [L, X] or [X].
            kept_layers: Whose attention and MLP are forced to stay, and so the best unit inside each.
        """
        gates = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        if "hidden" in gates:
            gates["hidden"][0] = 1
        for half, inside in INSIDE.items():
            for layer in kept_layers if half in gates else ():
                gates[half][layer] = 1
                for name in inside:
                    if name in gates:
                        gates[name][layer, 0] = 1
        return int(self.count(gates))

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
        left_L: Tensor = _left(self.shape, self.costs, hidden, units)
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

        left: float = _left(self.shape, self.costs, self.hidden, units)
        return left


def _left(shape: Shape, costs: UnitCosts, hidden: Any, units: Callable[[str, int], Any]) -> Any:
    """Prunable parameters that stay in a layer, or in each one: numbers or tensors alike.

    Args:
        shape: Of the source.
        costs: Of its units.
        hidden: Dimensions that stay.
        units: What stays of a group, given its name and whole size.
    """
    if shape.num_heads == shape.num_kv_heads:  # a head goes with its key and value
        queries = key_values = units("head", shape.num_heads)
    else:
        key_values = units("kv_head", shape.num_kv_heads)
        queries = key_values * units("head", shape.num_heads // shape.num_kv_heads)
    attention = queries * (hidden * costs.query + costs.query_bias) + hidden * costs.attention
    attention = attention + key_values * (hidden * costs.key_value + costs.key_value_bias)
    mlp = units("intermediate", shape.intermediate_size) * (hidden * costs.intermediate + costs.intermediate_bias)
    return units("attention_layer", 1) * attention + units("mlp_layer", 1) * (mlp + hidden * costs.mlp)
