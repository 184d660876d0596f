"""Parameter counts in closed form, for plans and scores; importable without torch."""

from typing import Any

from shearing.models.family import Family, family_of, has_bias, is_tied, shape_of, vocabulary_of
from shearing.models.shape import Shape


def _layer_parameters(family: Family, config: Any, shape: Shape) -> int:
    """Weights and biases of the seven projections of one layer."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    query = shape.num_heads * shape.head_size
    key_value = shape.num_kv_heads * shape.head_size
    weights = 2 * hidden * (query + key_value) + 3 * hidden * intermediate
    biases = 0
    if has_bias(family, config, family.qkv_bias):
        biases += query + 2 * key_value
    if has_bias(family, config, family.output_bias):
        biases += hidden
    if has_bias(family, config, family.mlp_bias):
        biases += 2 * intermediate + hidden
    return weights + biases


def prunable_parameters(config: Any, shape: Shape | None = None) -> int:
    """Parameters of attention and MLP projections: all but embeddings, LM head and norms.

    Args:
        config: A config.json's dict or a transformers config; its family and biases count.
        shape: Counted at this shape; default the config's own.

    Source: arXiv 2310.06694, section 2.1 (its sparsity leaves the same out).
    """
    family, shape = family_of(config), shape or shape_of(config)
    return shape.num_layers * _layer_parameters(family, config, shape)


def count_parameters(config: Any, shape: Shape | None = None, vocabulary: int | None = None) -> int:
    """All parameters of the model; a table that embedding and LM head share counts once.

    Args:
        config: A config.json's dict or a transformers config.
        shape: Counted at this shape; default the config's own.
        vocabulary: Rows of the embedding table; default the config's own.
    """
    family, shape = family_of(config), shape or shape_of(config)
    vocabulary = vocabulary_of(config) if vocabulary is None else vocabulary
    tables = vocabulary * shape.hidden_size * (1 if is_tied(config) else 2)
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    head_norms = shape.num_layers * len(family.head_norms) * shape.head_size
    return prunable_parameters(config, shape) + tables + norms + head_norms
