"""How many parameters an overall sparsity leaves (CoFi, arXiv 2204.00408), in plain numbers, without torch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

from shearing.models.family import family_of, has_bias, shape_of
from shearing.models.parameters import count_parameters, parameters_outside, prunable_parameters
from shearing.models.shape import Shape
from shearing.pruning.config import PruningTarget

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


class OverallBudget:
    """The prunable parameters of a source model, and how many of them may stay.

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
        assert self.least((), ()) == self.total

    @classmethod
    def of_all(cls, config: Any, parameters: int) -> Self:
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
        assert found.least((), ()) == found.total
        return found

    @classmethod
    def asked(cls, config: Any, target: PruningTarget) -> Self:
        """By what a target gives that is no shape: a sparsity or a number of parameters."""
        if target.sparsity is not None:
            return cls(config, target.sparsity)
        assert target.parameters is not None
        return cls.of_all(config, target.parameters)

    def least(self, groups: Collection[str], kept_layers: Collection[int]) -> int:
        """Parameters left when every gate that may close has closed.

        Args:
            groups: That have gates.
            kept_layers: Whose attention and MLP are forced to stay, and so the best unit inside each.
        """
        hidden = 1 if "hidden" in groups else self.shape.hidden_size

        def left_in(layer: int) -> int:
            kept = {name for half, inside in INSIDE.items() if half in groups for name in (half, *inside)}
            staying = kept if layer in kept_layers else set()

            def units(name: str, size: int) -> int:
                return size if name not in groups else int(name in staying)

            return int(left_in_layer(self.shape, self.costs, hidden, units))

        return sum(map(left_in, range(self.shape.num_layers))) + self.outside[0] * hidden + self.outside[1]


def left_in_layer(shape: Shape, costs: UnitCosts, hidden: Any, units: Callable[[str, int], Any]) -> Any:
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
