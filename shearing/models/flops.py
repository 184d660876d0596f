"""Model FLOPs of training, and what devices can do at most, for MFU; importable without torch."""

import re
from typing import Any

from shearing.models.family import SLICED, as_config_dict, config_value, family_of, is_tied, shape_of, vocabulary_of
from shearing.models.parameters import UNEVEN, count_parameters

# Dense bfloat16 FLOPs a second of the tensor cores, from the maker's data sheets, by whole words of the device's name.
# The first that fits holds.
PEAK_BFLOAT16 = {
    r"B200": 2250e12,
    r"H200|GH200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"A10G": 70e12,
    r"L40S": 362e12,
    r"L4": 121e12,
}

FROZEN_SHARE = 2 / 3  # of training's FLOPs where the weights stay as they are: no gradient of theirs is formed


def training_flops_per_token(config: Any, sequence_tokens: int) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L H P T.

    N counts all parameters but the embedding tables; a table that is the LM head too counts, for there it multiplies.
    L layers, H heads of size P, T tokens a sequence. Nothing is taken off for the causal half of attention, nor added
    for activations that are computed twice. In mask learning the whole model computes, whatever its gates say.

    Args:
        config: A config.json's dict or a transformers config.
        sequence_tokens: T.

    Raises:
        UserError: Unknown family.

    Source: PaLM (arXiv 2204.02311, appendix B).
    """
    family, shape = family_of(config), shape_of(config)
    rows = 0 if is_tied(config) else vocabulary_of(config)
    if family.positions is not None:
        rows += config_value(family, config, "max_position_embeddings") + family.position_offset
    width = as_config_dict(config)[SLICED]["first"] if SLICED in as_config_dict(config) else shape.hidden_size
    multiplying = count_parameters(config) - rows * width
    return 6 * multiplying + 12 * _heads(config) * shape.head_size * sequence_tokens


def _heads(config: Any) -> int:
    """Query heads of all layers together."""
    shape = shape_of(config)
    uneven = as_config_dict(config).get(UNEVEN)
    if not uneven:
        return shape.num_layers * shape.num_heads
    key = family_of(config).dimension_keys["num_heads"]
    return sum(layer.get(key, 0) for layer in uneven["layers"])


def peak_flops_per_s(device_name: str, dtype: str) -> float | None:
    """The most that one device can do, dense; None where this table does not know."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BFLOAT16.items() if re.search(rf"\b({name})\b", device_name)), None)
