"""Names and sizes of all parameters in closed form, for plans, scores and checks; importable without torch."""

from collections.abc import Callable
from math import prod
from typing import Any

from shearing.models.families import Family
from shearing.models.family import (
    SLICED,
    as_config_dict,
    config_value,
    family_of,
    has_bias,
    is_tied,
    shape_of,
    vocabulary_of,
)
from shearing.models.shape import Shape

Sizes = dict[str, tuple[int, ...]]
UNEVEN = "uneven"  # key of a config whose layers have sizes of their own; see `shearing.models.uneven_modeling`


def _projections(family: Family, config: Any, shape: Shape) -> Sizes:
    """Weights and biases of one layer's projections, by their names in the layer."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    rows = {family.query: query, family.key: key_value, family.value: key_value}
    if family.qkv_rows != "apart":
        rows = {family.query: query + 2 * key_value}
    traits = dict.fromkeys(rows, family.qkv_bias)
    inputs = dict.fromkeys(rows, hidden)
    fused = family.gate == family.up
    for name in (family.gate, family.up):
        if name is not None:
            rows[name], inputs[name] = (2 if fused else 1) * intermediate, hidden
            traits[name] = family.mlp_bias
    rows |= {family.output: hidden, family.down: hidden}
    inputs |= {family.output: query, family.down: intermediate}
    traits |= {family.output: family.output_bias, family.down: family.mlp_bias}
    sizes: Sizes = {f"{name}.weight": (rows[name], inputs[name]) for name in rows}
    return sizes | {f"{name}.bias": (rows[name],) for name in rows if has_bias(family, config, traits[name])}


def _norm(family: Family, name: str, size: int) -> Sizes:
    kinds = ("weight", "bias") if family.norm == "layer" else ("weight",)
    return {f"{name}.{kind}": (size,) for kind in kinds}


def _norms(family: Family, shape: Shape) -> Sizes:
    """Norms of one layer, by their names in the layer."""
    sizes: Sizes = {}
    for name in (*family.pre_norms, *family.post_norms):
        sizes |= _norm(family, name, shape.hidden_size)
    heads = (1, 1) if family.head_norm_span == "head" else (shape.num_heads, shape.num_kv_heads)
    for name, count in zip(family.head_norms, heads, strict=False):
        sizes |= _norm(family, name, count * shape.head_size)
    return sizes


def _outside(family: Family, config: Any, shape: Shape, vocabulary: int) -> Sizes:
    """Embeddings, final norm and LM head, which is left out where it is the embedding table."""
    sizes: Sizes = {f"{family.embedding}.weight": (vocabulary, shape.hidden_size)}
    if family.positions is not None:
        rows = config_value(family, config, "max_position_embeddings") + family.position_offset
        sizes[f"{family.positions}.weight"] = (rows, shape.hidden_size)
    sizes |= _norm(family, family.final_norm, shape.hidden_size)
    if not is_tied(config):
        sizes[f"{family.lm_head}.weight"] = (vocabulary, shape.hidden_size)
    if family.head_bias:
        sizes[f"{family.lm_head}.bias"] = (vocabulary,)
    return sizes


def parameter_sizes(config: Any) -> Sizes:
    """Every parameter of a model by its full name; a table that embedding and LM head share is there once."""
    if SLICED in as_config_dict(config):
        return _sliced_sizes(config)
    family, shape = family_of(config), shape_of(config)
    layer = _projections(family, config, shape) | _norms(family, shape)
    sizes = _outside(family, config, shape, vocabulary_of(config))
    for number in range(shape.num_layers):
        sizes |= {family.layer_module(number, name): size for name, size in layer.items()}
    return sizes


def _sliced_sizes(config: Any) -> Sizes:
    family, shape, description = family_of(config), shape_of(config), as_config_dict(config)[SLICED]
    names, bias = description["names"], description["names"]["reader_bias"]
    whole = _outside(family, config, shape, vocabulary_of(config))
    sizes: Sizes = {
        f"{name}.weight": (whole[f"{name}.weight"][0], description["first"]) for name in names["embeddings"]
    }
    for number, layer in enumerate(description["layers"]):
        found = {name: tuple(size) for name, size in layer["residuals"].items()}
        for name, size in _projections(family, config, shape).items():
            module, kind = name.rsplit(".", 1)
            if module in layer["writers"]:
                found[name] = (layer["writers"][module], *size[1:])
                continue
            found[name] = (size[0], layer["readers"][module]) if kind == "weight" else size
            if bias:
                found[f"{module}.bias"] = (size[0],)
        found |= {name: size for name, size in _norms(family, shape).items() if name.startswith(family.head_norms)}
        sizes |= {family.layer_module(number, name): size for name, size in found.items()}
    sizes[f"{family.lm_head}.weight"] = (vocabulary_of(config), description["last"])
    if bias or family.head_bias:
        sizes[f"{family.lm_head}.bias"] = (vocabulary_of(config),)
    return sizes


def _total(sizes: Sizes) -> int:
    return sum(prod(size) for size in sizes.values())


def prunable_parameters(config: Any, shape: Shape | None = None) -> int:
    """Parameters of attention and MLP projections, and of residual matrices: all but embeddings, LM head and norms.

    Args:
        config: A config.json's dict or a transformers config; its family and biases count.
        shape: Counted at this shape; default the config's own.

    Source: arXiv 2310.06694, section 2.1 (its sparsity leaves the same out).
    """
    family = family_of(config)
    if shape is None and SLICED in as_config_dict(config):
        return _total({name: size for name, size in _sliced_sizes(config).items() if name.startswith(family.layers)})
    uneven = as_config_dict(config).get(UNEVEN) if shape is None else None
    if uneven:
        return sum(_total(_present(_projections, family, config, layer)) for layer in uneven["layers"])
    shape = shape or shape_of(config)
    return shape.num_layers * _total(_projections(family, config, shape))


def _present(sizes: Callable[..., Sizes], family: Family, config: Any, layer: dict[str, Any]) -> Sizes:
    """Of `sizes` at one uneven layer's own sizes, what that layer has."""
    own = {name: layer[key] for name, key in family.dimension_keys.items() if key in layer}
    shape, halves = shape_of(config).model_copy(update=own), as_config_dict(config)[UNEVEN]["modules"]
    found = sizes(family, config, shape) if sizes is _projections else sizes(family, shape)
    absent = tuple(f"{name}." for half in layer.get("skip", []) for name in halves[half])
    return {name: size for name, size in found.items() if not name.startswith(absent)}


def count_parameters(config: Any, shape: Shape | None = None, vocabulary: int | None = None) -> int:
    """All parameters of the model; a table that embedding and LM head share counts once.

    Args:
        config: A config.json's dict or a transformers config.
        shape: Counted at this shape; default the config's own.
        vocabulary: Rows of the embedding table; default the config's own.
    """
    if shape is None and SLICED in as_config_dict(config):
        return _total(_sliced_sizes(config))
    family, whole, shape = family_of(config), shape, shape or shape_of(config)
    vocabulary = vocabulary_of(config) if vocabulary is None else vocabulary
    norms = shape.num_layers * _total(_norms(family, shape))
    layers = as_config_dict(config).get(UNEVEN, {}).get("layers") if whole is None else None
    if layers:
        norms = sum(_total(_present(_norms, family, config, layer)) for layer in layers)
    return prunable_parameters(config, whole) + norms + _total(_outside(family, config, shape, vocabulary))
