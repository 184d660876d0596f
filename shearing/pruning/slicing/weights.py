"""Weights of the sliced model out of the source's and the rotations, one part after another.

Shape suffixes: V rows of a table, D hidden, K dimensions kept.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shearing.models.families import Family
from shearing.pruning.slicing.fusion import CHUNK_ROWS, Linear, centred_rows, fused_head, fused_linear
from shearing.pruning.slicing.plan import attention_readers, mlp_readers

Tensors = Iterator[tuple[str, Tensor]]


class RotatedWeights:
    """The source's weights between bare norms, turned into given bases (arXiv 2401.15024, section 3.2).

    Args:
        family: Of the source model.
        tensors: Its weights, by their names in memory; read one at a time.
        dtype: Of the weights made; products are formed in float64.
    """

    def __init__(self, family: Family, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._family, self._tensors, self._dtype = family, tensors, dtype

    def tables(self, basis_DK: Tensor) -> Tensors:
        """Embedding and learned positions, by their full names."""
        for name in (self._family.embedding, self._family.positions):
            if name is not None:
                chunks = self._tensors[f"{name}.weight"].split(CHUNK_ROWS)
                turned = [(centred_rows(self._family, rows_VD.double()) @ basis_DK) for rows_VD in chunks]
                yield f"{name}.weight", torch.cat([rows_VK.to(self._dtype) for rows_VK in turned])

    def fused_layer(self, index: int) -> Tensors:
        """Projections and head norms of one layer as they are, between bare norms; by their names in the layer."""
        for name in (*attention_readers(self._family), *mlp_readers(self._family)):
            yield from self._named(name, self._linear(index, name))
        for name in (self._family.output, self._family.down):
            yield from self._named(name, self._linear(index, name))
        yield from self._head_norms(index)

    def layer(self, index: int, read: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> Tensors:
        """Projections and head norms of one layer in given bases, by their names in the layer.

        Args:
            index: Its number.
            read: Basis [D, K] of the signal that `attention` reads, and of the one that `mlp` reads.
            written: Of the signal that each of them adds to.
        """
        family = self._family
        for half, names in (("attention", attention_readers(family)), ("mlp", mlp_readers(family))):
            for name in names:
                linear = self._linear(index, name)
                yield from self._named(name, Linear(linear.weight @ read[half], linear.bias))
        for half, name in (("attention", family.output), ("mlp", family.down)):
            linear, basis_DK = self._linear(index, name), written[half]
            bias = None if linear.bias is None else basis_DK.T @ linear.bias
            yield from self._named(name, Linear(basis_DK.T @ linear.weight, bias))
        yield from self._head_norms(index)

    def head(self, basis_DK: Tensor) -> Tensors:
        """LM head, by its full name."""
        weights, biases = [], []
        for rows in fused_head(self._family, self._tensors):
            weights.append((rows.weight @ basis_DK).to(self._dtype))
            biases.append(rows.bias)
        bias = torch.cat([part for part in biases if part is not None]) if biases[0] is not None else None
        yield from self._named(self._family.lm_head, Linear(torch.cat(weights), bias))

    def residual(self, name: str, read_DK: Tensor, written_DK: Tensor) -> Tensors:
        """The matrix that turns the residual stream from one basis into the next."""
        yield name, (read_DK.T @ written_DK).to(self._dtype)

    def plain_norm(self, name: str, size: int) -> Tensors:
        """A norm of the family's own that multiplies by 1 and adds nothing."""
        yield f"{name}.weight", torch.full((size,), float(self._family.norm != "rms_plus_one"), dtype=self._dtype)
        if self._family.norm == "layer":
            yield f"{name}.bias", torch.zeros(size, dtype=self._dtype)

    def _linear(self, index: int, name: str) -> Linear:
        return fused_linear(self._family, self._tensors, index, name)

    def _head_norms(self, index: int) -> Tensors:
        for norm in self._family.head_norms:
            yield f"{norm}.weight", self._tensors[f"{self._family.layer_module(index, norm)}.weight"].to(self._dtype)

    def _named(self, name: str, linear: Linear) -> Tensors:
        yield f"{name}.weight", linear.weight.to(self._dtype)
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias.to(self._dtype)
