"""From a target shape to gate groups, and what is wrong with a target; importable without torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from shearing.models.families import Family
from shearing.models.family import head_size_is_quotient, shape_of
from shearing.models.parameters import count_parameters, prunable_parameters
from shearing.models.shape import Shape, TargetShape
from shearing.pruning.budget import INSIDE, OverallBudget
from shearing.pruning.config import PruningConfig, PruningTarget

GROUPS = ("layer", "hidden", "head", "kv_head", "intermediate")
OVERALL_GROUPS = ("hidden", "head", "kv_head", "intermediate", "attention_layer", "mlp_layer")


@dataclass(frozen=True)
class GroupSpec:
    """One group of gates.

    Attributes:
        size: Units in a row.
        target: Units of a row that stay; None where only the sparsity of all groups together is asked for.
        rows: Layers, where every layer has gates of its own; None for one row that the whole model shares.
        kept: Units of every row that are forced to stay: their gates are the constant 1.
        dropped: Units of every row that are forced to go: their gates are the constant 0.
    """

    size: int
    target: int | None
    rows: int | None = None
    kept: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the group's tensors: [size] or [rows, size]."""
        return (self.size,) if self.rows is None else (self.rows, self.size)

    @property
    def target_sparsity(self) -> float:
        """Share of the units that goes: 1 - target / size."""
        assert self.target is not None
        return 1 - self.target / self.size


def target_shape(source: Shape, target: TargetShape) -> Shape:
    """The full shape that a target means: what it leaves out stays, and with multi-head attention (as many
    key/value heads as heads) the key/value heads follow the heads.
    """
    shape = target.within(source)
    if source.num_heads == source.num_kv_heads and target.num_kv_heads is None:
        shape = shape.model_copy(update={"num_kv_heads": shape.num_heads})
    return shape


def target_parameters(config: Any, target: PruningTarget) -> int:
    """All parameters of the pruned model, from the source model's config; of an overall sparsity as many at most."""
    if target.parameters is not None:
        return target.parameters
    if target.sparsity is None:
        return count_parameters(config, target_shape(shape_of(config), target))
    return count_parameters(config) - math.ceil(prunable_parameters(config) * target.sparsity)


def gate_groups(source: Shape, target: Shape, groups: Iterable[str] | None = None) -> dict[str, GroupSpec]:
    """The gate groups that lead from source to target.

    Args:
        source: Shape before.
        target: Full shape after, as `target_shape` gives it.
        groups: Names of the groups wanted; default every group whose dimension changes. A group of a dimension that
            does not change has a target sparsity of zero.

    Returns:
        Group specifications in the order of GROUPS. With multi-head attention `head` is [layers, heads] and a head's
        key and value go with it. With grouped-query attention `kv_head` [layers, key/value heads] holds whole groups
        with their queries, and `head` [layers, queries of a group] the queries of every group, by one mask for all
        groups of a layer, so that heads stay a multiple of key/value heads.
    """
    layers = source.num_layers
    ratio, ratio_after = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    specs = {
        "layer": GroupSpec(source.num_layers, target.num_layers),
        "hidden": GroupSpec(source.hidden_size, target.hidden_size),
        "head": GroupSpec(source.num_heads, target.num_heads, layers),
        "intermediate": GroupSpec(source.intermediate_size, target.intermediate_size, layers),
    }
    if source.num_heads != source.num_kv_heads:
        specs["head"] = GroupSpec(ratio, ratio_after, layers)
        specs["kv_head"] = GroupSpec(source.num_kv_heads, target.num_kv_heads, layers)
    wanted = {name for name, spec in specs.items() if spec.target != spec.size} if groups is None else set(groups)
    return {name: specs[name] for name in GROUPS if name in specs and name in wanted}


def pruning_groups(source: Shape, config: PruningConfig) -> dict[str, GroupSpec]:
    """The gate groups of a recipe's pruning section, with the layers that it forces to stay or go."""
    if not config.target.is_overall:
        groups = gate_groups(source, target_shape(source, config.target), config.gates.groups)
    else:
        groups = overall_groups(source, config.gates.groups)
    kept, dropped = (layer_numbers(asked.layers, source.num_layers) for asked in (config.keep, config.drop))
    for name in ("layer", "attention_layer", "mlp_layer"):
        if name in groups:
            groups[name] = replace(groups[name], kept=kept, dropped=dropped)
    return groups


def overall_groups(source: Shape, groups: Iterable[str] | None = None) -> dict[str, GroupSpec]:
    """The gate groups of an overall sparsity, without targets of their own (arXiv 2204.00408, section 3).

    With grouped-query attention whole groups go by default; queries inside them as well where `groups` names `head`.
    """
    layers, ratio = source.num_layers, source.num_heads // source.num_kv_heads
    specs = {
        "hidden": GroupSpec(source.hidden_size, None),
        "head": GroupSpec(source.num_heads if ratio == 1 else ratio, None, layers),
        "kv_head": GroupSpec(source.num_kv_heads, None, layers),
        "intermediate": GroupSpec(source.intermediate_size, None, layers),
        "attention_layer": GroupSpec(layers, None),
        "mlp_layer": GroupSpec(layers, None),
    }
    if ratio == 1:
        del specs["kv_head"]
    wanted = set(specs) - ({"head"} if ratio > 1 else set()) if groups is None else set(groups)
    return {name: spec for name, spec in specs.items() if name in wanted}


def layer_numbers(layers: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Layers as numbers from 0, ascending, each once; negative ones count from the end."""
    return tuple(sorted({layer % num_layers for layer in layers}))


def check_pruning(
    family: Family, source: Shape, config: PruningConfig, path: str = "pruning", *, source_config: Any = None
) -> list[str]:
    """What is wrong with a recipe's pruning section for a source model, one complete message a problem.

    Args:
        family: Of the source model.
        source: Its shape.
        config: The section.
        path: Where it stands in the recipe, for the messages.
        source_config: Of the source model; without it nothing is known of its rotary embedding.
    """
    if config.target.is_overall:
        return _overall_problems(family, source, config, path, source_config)
    problems = check_target(family, source, config.target, config.gates.groups, path, config=source_config)
    stay = target_shape(source, config.target).num_layers
    return problems + _layer_list_problems(source.num_layers, stay, config, path)


def _overall_problems(family: Family, source: Shape, config: PruningConfig, path: str, source_config: Any) -> list[str]:
    given = config.target.model_dump(exclude_none=True)
    bound = "sparsity" if config.target.sparsity is not None else "parameters"
    problems = []
    if rest := [name for name in given if name != bound]:
        problems.append(
            f"{path}.target has {bound} and {_listed(rest)}; allowed: sizes, or a sparsity or a number of parameters "
            f"in their place, from which sizes follow. Set {path}.target.{bound}=null or take the rest out."
        )
    if config.method != "learned":
        problems.append(
            f"{path}.method = {config.method} needs sizes to choose for, and {path}.target gives {bound} alone, which "
            f"only gates can spread over groups; allowed: learned. Set {path}.method=learned, or a shape as target."
        )
    possible = overall_groups(source, OVERALL_GROUPS)
    problems += [
        f"{path}.gates.groups has {name!r}, which has no part in an overall sparsity of this source; allowed: "
        f"{_listed(possible)}. Remove {name!r}."
        for name in config.gates.groups or []
        if name not in possible
    ]
    if head_size_is_quotient(family, source_config or {}):
        problems.append(
            f"{path}.target.{bound} leaves layers with heads of their own number, and Hugging Face's "
            f"{family.architecture} takes hidden size over heads for the head size; allowed for this family: a target "
            f"shape. Set {path}.target.{bound}=null and sizes."
        )
    halves = [name for name in INSIDE if config.gates.groups is not None and name not in config.gates.groups]
    problems += [
        f"{path}.{key}.layers needs gates over attention and MLP of a layer; {path}.gates.groups lacks "
        f"{_listed(halves)}. Add {_listed(halves)} to it, or take {path}.{key}.layers out."
        for key, asked in (("keep", config.keep), ("drop", config.drop))
        if asked.layers and halves
    ]
    stay = source.num_layers - len(layer_numbers(config.drop.layers, source.num_layers))
    problems += _layer_list_problems(source.num_layers, stay, config, path)
    if stay == 0:
        problems.append(f"{path}.drop.layers names every layer; allowed: all but one. Shorten the list.")
    if problems or source_config is None:
        return problems
    return _budget_problems(source, config, path, source_config)


def _budget_problems(source: Shape, config: PruningConfig, path: str, source_config: Any) -> list[str]:
    """Whether gates can reach what an overall target asks for at all."""
    overall = OverallBudget.asked(source_config, config.target)
    least = overall.least(
        overall_groups(source, config.gates.groups), layer_numbers(config.keep.layers, source.num_layers)
    )
    if least < overall.budget < overall.total:
        return []
    bound = "sparsity" if config.target.sparsity is not None else "parameters"
    if bound == "sparsity":
        given, most = f"{config.target.sparsity:g}", math.floor(100 * (1 - least / overall.total)) / 100
        remedy = f"Set {path}.target.sparsity={most:g} or less"
    else:
        given, remedy = f"{config.target.parameters:,}", f"Set {path}.target.parameters={(least + overall.total) // 2}"
    return [
        f"{path}.target.{bound} = {given} asks for {overall.budget:,} of the {overall.total:,} parameters that count, "
        f"of which {least:,} stay when every gate is closed that may; allowed: more than these, and fewer than all. "
        f"{remedy}, or let more groups have gates ({path}.gates.groups)."
    ]


def _layer_list_problems(size: int, stay: int, config: PruningConfig, path: str) -> list[str]:
    problems = [
        f"{path}.{key}.layers names {_listed(wrong)}, which a source with {size} layers does not have; allowed: "
        f"0 to {size - 1}, or -{size} to -1 from the end. Remove {_listed(wrong)} from {path}.{key}.layers."
        for key, asked in (("keep", config.keep), ("drop", config.drop))
        if (wrong := [layer for layer in asked.layers if not -size <= layer < size])
    ]
    if problems or stay > size:
        return problems
    kept, dropped = layer_numbers(config.keep.layers, size), layer_numbers(config.drop.layers, size)
    if both := sorted(set(kept) & set(dropped)):
        problems.append(
            f"{path}.keep.layers and {path}.drop.layers both name layers {_listed(both)} (negative numbers count from "
            "the end); a layer can be in one of them. Remove it from the other."
        )
    if len(kept) > stay:
        problems.append(
            f"{path}.keep.layers forces {len(kept)} layers to stay, but the target keeps {stay} of {size}; allowed: "
            f"at most {stay}. Set {path}.target.num_layers={len(kept)} or shorten the list."
        )
    if len(dropped) > size - stay:
        problems.append(
            f"{path}.drop.layers forces {len(dropped)} layers to go, but the target keeps {stay} of {size}; allowed: "
            f"at most {size - stay}. Set {path}.target.num_layers={size - len(dropped)} or shorten the list."
        )
    return problems


def check_target(
    family: Family,
    source: Shape,
    target: TargetShape,
    groups: Iterable[str] | None = None,
    path: str = "pruning",
    *,
    config: Any = None,
) -> list[str]:
    """What is wrong with a target, one complete message a problem; an empty list if nothing is.

    Args:
        family: Of the source model.
        source: Its shape.
        target: What the recipe asks for.
        groups: Gate groups that the recipe names; None where it leaves them to the target.
        path: Where the target stands in the recipe, for the messages.
        config: Of the source model; without it nothing is known of its rotary embedding.
    """
    shape = target_shape(source, target)
    problems = [
        f"{path}.target.{name} = {asked} is larger than the source's {getattr(source, name)}; pruning only removes. "
        f"Set {path}.target.{name} to {getattr(source, name)} or less, or leave it out."
        for name, asked in target.model_dump(exclude_none=True).items()
        if asked > getattr(source, name)
    ]
    if not problems:
        problems += _head_problems(source, target, shape, path)
    if not problems:
        problems += _hidden_problems(family, source, shape, path, quotient=head_size_is_quotient(family, config or {}))
    if problems:
        return problems
    if shape == source:
        return [
            f"{path}.target is the source's own shape ({_described(source)}): there is nothing to prune. "
            f"Set at least one of {path}.target.{{{', '.join(TargetShape.model_fields)}}} below the source's."
        ]
    return [] if groups is None else _group_problems(source, shape, list(groups), path)


def _hidden_problems(family: Family, source: Shape, shape: Shape, path: str, *, quotient: bool) -> list[str]:
    hidden, heads = shape.hidden_size, shape.num_heads
    needed = heads * source.head_size
    if quotient and hidden != needed:
        fitting = hidden // source.head_size
        other = f" with {heads} heads" if hidden % source.head_size else f", or num_heads = {fitting} with this size"
        return [
            f"{path}.target.hidden_size = {hidden} is not num_heads x head size = {heads} x {source.head_size}, and "
            f"Hugging Face's {family.architecture} takes the quotient for the head size, which pruning keeps; allowed: "
            f"{needed}{other}. Set {path}.target.hidden_size={needed}."
        ]
    if family.hidden_multiple_of_heads and hidden % heads:
        below = hidden // heads * heads
        allowed = [size for size in (below, below + heads) if 0 < size <= source.hidden_size]
        return [
            f"{path}.target.hidden_size = {hidden} is not a multiple of num_heads = {heads}, "
            f"which Hugging Face's {family.architecture} needs; allowed nearby: {_listed(allowed)}. "
            f"Set {path}.target.hidden_size={allowed[0] if allowed else heads}."
        ]
    return []


def _head_problems(source: Shape, target: TargetShape, shape: Shape, path: str) -> list[str]:
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if source.num_heads == source.num_kv_heads:
        if heads == kv_heads:
            return []
        return [
            f"{path}.target.num_kv_heads = {kv_heads} differs from num_heads = {heads}, but the source has multi-head "
            f"attention (num_heads = num_kv_heads = {source.num_heads}), where a head goes with its key and value; "
            f"allowed: the same number. Set {path}.target.num_heads={kv_heads} or leave num_kv_heads out."
        ]
    ratio = source.num_heads // source.num_kv_heads
    allowed = [kv_heads * queries for queries in range(1, ratio + 1)]
    if heads in allowed:
        return []
    nearest = max((count for count in allowed if count <= heads), default=allowed[0])
    asked = "" if target.num_heads is not None else " (the source's, since the target leaves it out)"
    why = (
        f"is not a multiple of num_kv_heads = {kv_heads}"
        if heads % kv_heads
        else (
            f"gives every one of {kv_heads} key/value heads {heads // kv_heads} queries, where the source has {ratio}"
        )
    )
    return [
        f"{path}.target.num_heads = {heads}{asked} {why}; allowed: {_listed(allowed)}. "
        f"Set {path}.target.num_heads={nearest}."
    ]


def _group_problems(source: Shape, shape: Shape, groups: list[str], path: str) -> list[str]:
    needed = gate_groups(source, shape)
    possible = gate_groups(source, shape, GROUPS)
    problems = [
        f"{path}.gates.groups lacks {name!r}, but the target changes what it holds ({spec.size} -> {spec.target}"
        f"{' in each layer' if spec.rows else ''}); given: {_listed(groups)}. Add {name!r}, or leave "
        f"{path}.gates.groups out for every group that the target needs: {_listed(needed)}."
        for name, spec in needed.items()
        if name not in groups
    ]
    problems += [
        f"{path}.gates.groups has {name!r}, which a source with {source.num_heads} heads and {source.num_kv_heads} "
        f"key/value heads does not have; allowed: {_listed(possible)}. Remove {name!r}."
        for name in groups
        if name not in possible
    ]
    return problems


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values) or "none"


def _described(shape: Shape) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.model_dump().items())
