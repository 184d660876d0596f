"""Norms folded into the linear layers beside them, in float64 (arXiv 2401.15024, section 3.1).

What a norm multiplies and adds goes into the linear layers that read it. The mean that a LayerNorm subtracts goes into
whatever writes to the residual stream: embeddings and the last linear layers of attention and MLP. A norm that is left
divides by the root mean square alone, so the stream can be rotated. Where norms subtract no mean, none is subtracted.
Shape suffixes: O, I output and input size of a linear layer, D hidden, V rows of a table.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from shearing.models.families import Family
from shearing.pruning.slicing.plan import attention_readers

CHUNK_ROWS = 8192  # of a table over the vocabulary that are in float64 at once


class Linear(NamedTuple):
    """Weight [O, I] and bias [O] of a linear layer."""

    weight: Tensor
    bias: Tensor | None


def fused_linear(family: Family, tensors: Mapping[str, Tensor], layer: int, name: str) -> Linear:
    """A projection of a layer between bare norms, in float64.

    Args:
        family: Of the source model.
        tensors: Its weights, by their names in memory.
        layer: Number of the layer.
        name: Of the projection, in the layer.
    """
    linear = _linear(tensors, family.layer_module(layer, name))
    if name in (family.output, family.down):
        return _centred(linear) if family.norm == "layer" else linear
    norm = family.attention_norm
    if name not in attention_readers(family) and family.mlp_norm is not None:
        norm = family.mlp_norm
    assert norm is not None
    return _behind_norm(family, tensors, family.layer_module(layer, norm), linear)


def fused_head(family: Family, tensors: Mapping[str, Tensor]) -> Iterator[Linear]:
    """Rows of the LM head behind a bare norm, in float64, some at a time; the embedding's where both are one table."""
    weight = tensors.get(f"{family.lm_head}.weight")
    bias = tensors.get(f"{family.lm_head}.bias")
    weight = tensors[f"{family.embedding}.weight"] if weight is None else weight
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        part = Linear(weight[rows].double(), None if bias is None else bias[rows].double())
        yield _behind_norm(family, tensors, family.final_norm, part)


def centred_rows(family: Family, rows_VD: Tensor) -> Tensor:
    """What the first layer of the fused model reads, of what the source's first layer reads; any leading dimensions."""
    return rows_VD - rows_VD.mean(-1, keepdim=True) if family.norm == "layer" else rows_VD


def _linear(tensors: Mapping[str, Tensor], full_name: str) -> Linear:
    bias = tensors.get(f"{full_name}.bias")
    return Linear(tensors[f"{full_name}.weight"].double(), None if bias is None else bias.double())


def _centred(linear: Linear) -> Linear:
    bias = linear.bias
    return Linear(linear.weight - linear.weight.mean(0), None if bias is None else bias - bias.mean())


def _behind_norm(family: Family, tensors: Mapping[str, Tensor], norm: str, linear: Linear) -> Linear:
    weight_D, bias = tensors[f"{norm}.weight"].double(), linear.bias
    if family.norm == "rms_plus_one":
        weight_D = weight_D + 1
    if family.norm == "layer":
        added = linear.weight @ tensors[f"{norm}.bias"].double()
        bias = added if bias is None else bias + added
    return Linear(linear.weight * weight_D, bias)
