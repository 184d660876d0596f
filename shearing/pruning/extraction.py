"""A smaller model out of a masked one: units kept, gates folded into the weights, layers renumbered.

The formulas are those of `shearing.pruning.masks`, so the masked model at the target's size and the extracted one are
the same function. Shape suffixes as there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shearing.models.families import Family
from shearing.models.family import is_tied, resized_config, shape_of
from shearing.models.parameters import parameter_sizes
from shearing.models.shape import Shape
from shearing.pruning.gated_norms import gated_norm_weight, gated_vector
from shearing.pruning.masks import ExpandedGates, expand_gates, gated_weight
from shearing.pruning.target import gate_groups

HALF_LAYERS = {"attention_layer", "mlp_layer"}
Tensors = dict[str, Tensor]


def kept_units(z: Mapping[str, Tensor], source: Shape, target: Shape) -> dict[str, list[Any]]:
    """Source indices of the units that stay, ascending: the target's number of largest gates of every row.

    Args:
        z: Gates by group at the target's exact size, [.., N].
        source: Shape before.
        target: Full shape after.

    Returns:
        By group: a list of indices, or for groups with a row a layer one such list for every source layer. Of equal
        gates the earlier unit stays.

    Raises:
        ValueError: An open gate whose unit does not fit the target: the gates are not at the exact size. Or gates of
            attention and MLP apart: a layer that loses one of the two has no uniform shape.
    """
    specs = gate_groups(source, target, z.keys())
    halves = z.keys() & HALF_LAYERS
    if halves:
        raise ValueError(
            f"gates {sorted(halves)} take attention or MLP out of single layers, which no target shape holds. "
            "Cut whole layers by the group 'layer'."
        )
    kept: dict[str, list[Any]] = {}
    for name, gates in z.items():
        spec = specs[name]
        assert spec.target is not None, name
        rows = gates.detach().float().cpu().reshape(-1, spec.size)
        widest = int(rows.count_nonzero(dim=-1).max())
        if widest > spec.target or (name == "hidden" and widest < spec.target):
            raise ValueError(
                f"{widest} gates of {name!r} are open in a row where the target has {spec.target}: extraction would "
                "change the function. Take gates.deterministic(exact=True)."
            )
        order = torch.argsort(rows, dim=-1, descending=True, stable=True)[:, : spec.target]
        lists = order.sort(dim=-1).values.tolist()
        kept[name] = lists if spec.rows is not None else lists[0]
    return kept


class Indices:
    """Rows and columns that stay, for every source layer."""

    def __init__(self, kept: Mapping[str, list[Any]], source: Shape) -> None:
        self.layers: list[int] = kept.get("layer", list(range(source.num_layers)))
        self.hidden = torch.tensor(kept.get("hidden", list(range(source.hidden_size))))
        self._kept, self._source = kept, source

    def intermediate(self, layer: int) -> Tensor:
        """Intermediate units of a layer."""
        return torch.tensor(self._of("intermediate", layer, self._source.intermediate_size))

    def key_value_heads(self, layer: int) -> Tensor:
        """Heads of the key and value projections."""
        group = "head" if self._multi_head else "kv_head"
        return torch.tensor(self._of(group, layer, self._source.num_kv_heads))

    def heads(self, layer: int) -> Tensor:
        """Heads of the query and output projections: groups in order, their queries in order."""
        if self._multi_head:
            return self.key_value_heads(layer)
        ratio = self._source.num_heads // self._source.num_kv_heads
        queries = torch.tensor(self._of("head", layer, ratio))
        return (self.key_value_heads(layer)[:, None] * ratio + queries).reshape(-1)

    @property
    def _multi_head(self) -> bool:
        return self._source.num_heads == self._source.num_kv_heads

    def _of(self, group: str, layer: int, size: int) -> list[int]:
        return self._kept[group][layer] if group in self._kept else list(range(size))


def _head_rows(heads: Tensor, size: int) -> Tensor:
    """Rows of heads of `size` rows each."""
    return (heads[:, None] * size + torch.arange(size)).reshape(-1)


def _reader_rows(family: Family, source: Shape, indices: Indices, layer: int) -> dict[str, Tensor]:
    """Rows that stay of every projection that reads the hidden dimension, by its name in the layer."""
    heads, key_values = indices.heads(layer), indices.key_value_heads(layer)
    intermediate, size = indices.intermediate(layer), source.head_size
    queries = _head_rows(heads, size)
    if family.qkv_rows == "apart":
        keys = _head_rows(key_values, size)
        rows = {family.query: queries, family.key: keys, family.value: keys}
    elif family.qkv_rows == "blocks":
        keys = source.num_heads * size + _head_rows(key_values, size)
        rows = {family.query: torch.cat([queries, keys, source.num_kv_heads * size + keys])}
    else:
        rows = {family.query: _head_rows(heads, 3 * size)}
    if family.gate == family.up:
        return rows | {family.up: torch.cat([intermediate, source.intermediate_size + intermediate])}
    return rows | {name: intermediate for name in (family.gate, family.up) if name is not None}


def extract(
    config: Any,
    family: Family,
    tensors: Mapping[str, Tensor],
    z: Mapping[str, Tensor],
    target: Shape,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """The pruned model: its config, and its weights one after another.

    Args:
        config: Of the source model.
        family: Of the source model.
        tensors: The source's weights by their names in memory; read one at a time, so a lazy mapping will do.
        z: Gates by group at the target's exact size, from `gates.deterministic(exact=True)`.
        target: Full target shape, from `shearing.pruning.target.target_shape`.
        dtype: Of the weights written; default each weight's own. Products are formed in float32.

    Raises:
        ValueError: Gates not at the exact size; weights missing, or left over that the family does not know.
    """
    source = shape_of(config)
    indices = Indices(kept_units(z, source, target), source)
    gates = expand_gates({name: gate.detach().cpu() for name, gate in z.items()}, source)
    check_names(config, family, source, tensors)
    new_config = resized_config(config, target, indices.layers)
    if dtype is not None:
        new_config.pop("torch_dtype", None)
        new_config["dtype"] = str(dtype).removeprefix("torch.")
    weights = Fold(family, source, tensors, gates, indices).weights(is_tied(config))
    return new_config, ((name, tensor.to(dtype or tensor.dtype).contiguous()) for name, tensor in weights)


class Fold:
    """Every weight of the pruned model, cut and multiplied by its gates."""

    def __init__(
        self, family: Family, source: Shape, tensors: Mapping[str, Tensor], gates: ExpandedGates, indices: Indices
    ) -> None:
        self._family, self._source, self._tensors = family, source, tensors
        self._gates, self._indices = gates, indices
        self._hidden = indices.hidden
        self._hidden_gates = None if gates.hidden_D is None else gates.hidden_D[self._hidden]

    def weights(self, tied: bool) -> Iterator[tuple[str, Tensor]]:
        """The weights one after another, by their new names."""
        family, hidden, gates = self._family, self._hidden, self._hidden_gates
        embedding = self._tensors[f"{family.embedding}.weight"][:, hidden]
        scale = self._scale_change(embedding.dtype)
        if scale is not None:
            gates = scale.expand(len(hidden)) if gates is None else gates * scale
        yield f"{family.embedding}.weight", gated_vector(embedding, gates)
        if family.positions is not None:
            positions = self._tensors[f"{family.positions}.weight"][:, hidden]
            yield f"{family.positions}.weight", gated_vector(positions, self._hidden_gates)
        for new, layer in enumerate(self._indices.layers):
            for name, tensor in self._layer(layer).items():
                yield family.layer_module(new, name), tensor
        # Logits are E (w z n) of the normed stream n. Where the head is the embedding table, that table carries the z
        # already, and a final norm that carried it too would apply it twice; but it must undo the table's new scale.
        gates = self._hidden_gates
        if tied:
            gates = None if scale is None else (1 / scale).expand(len(hidden))
        yield from self._norm(family.final_norm, family.final_norm, gates).items()
        if not tied:
            yield f"{family.lm_head}.weight", self._tensors[f"{family.lm_head}.weight"][:, hidden]
        if family.head_bias:
            yield f"{family.lm_head}.bias", self._tensors[f"{family.lm_head}.bias"]

    def _scale_change(self, dtype: torch.dtype) -> Tensor | None:
        """What a scaled embedding must be multiplied by, since the model scales it by the root of its new size."""
        before, after = self._source.hidden_size, len(self._hidden)
        if not self._family.scaled_embedding or before == after:
            return None
        # the model rounds its scale to the type of its weights
        old, new = (torch.tensor(size**0.5).to(dtype).float() for size in (before, after))
        return old / new

    def _norm(self, full_name: str, new_name: str, gates: Tensor | None, kept: Tensor | None = None) -> Tensors:
        """Weight and, where there is one, bias of a norm; `kept` defaults to the hidden dimensions."""
        kept = self._hidden if kept is None else kept
        folded = {f"{new_name}.weight": self._tensors[f"{full_name}.weight"][kept]}
        folded[f"{new_name}.weight"] = gated_norm_weight(self._family.norm, folded[f"{new_name}.weight"], gates)
        if self._family.norm == "layer":
            folded[f"{new_name}.bias"] = gated_vector(self._tensors[f"{full_name}.bias"][kept], gates)
        return folded

    def _linear(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        full = self._family.layer_module(layer, name)
        return self._tensors[f"{full}.weight"], self._tensors.get(f"{full}.bias")

    def _layer(self, layer: int) -> Tensors:
        """Weights of one source layer, by their names in the layer."""
        family, gates, hidden = self._family, self._gates, self._hidden
        folded = self._layer_norms(layer)
        for name, rows in _reader_rows(family, self._source, self._indices, layer).items():
            weight, bias = self._linear(layer, name)
            folded[f"{name}.weight"] = weight[rows][:, hidden]
            if bias is not None:
                folded[f"{name}.bias"] = bias[rows]
        heads = _head_rows(self._indices.heads(layer), self._source.head_size)
        writers = (
            (family.output, family.attention_post_norm, gates.attention_LD, heads, gates.head_LI),
            (family.down, family.mlp_post_norm, gates.mlp_LD, self._indices.intermediate(layer), gates.intermediate_LF),
        )
        for name, norm, out_LD, columns, inner_LX in writers:
            out = self._hidden_gates if norm is not None else _row(out_LD, layer, hidden)
            weight, bias = self._linear(layer, name)
            inner = _row(inner_LX, layer, columns)
            folded[f"{name}.weight"] = gated_weight(weight[hidden][:, columns], out, inner)
            if bias is not None:
                folded[f"{name}.bias"] = gated_vector(bias[hidden], out)
        return folded

    def _layer_norms(self, layer: int) -> Tensors:
        family, gates, size = self._family, self._gates, self._source.head_size
        posts = ((family.attention_post_norm, gates.attention_LD), (family.mlp_post_norm, gates.mlp_LD))
        places: list[tuple[str, Tensor | None, Tensor]] = [
            (name, self._hidden_gates, self._hidden) for name in family.pre_norms
        ]
        places += [
            (name, _row(out_LD, layer, self._hidden), self._hidden) for name, out_LD in posts if name is not None
        ]
        for name, heads in zip(
            family.head_norms, (self._indices.heads(layer), self._indices.key_value_heads(layer)), strict=False
        ):
            whole = family.head_norm_span == "head"
            places.append((name, None, torch.arange(size) if whole else _head_rows(heads, size)))
        folded: Tensors = {}
        for name, norm_gates, kept in places:
            folded |= self._norm(family.layer_module(layer, name), name, norm_gates, kept)
        return folded


def _row(gates_LX: Tensor | None, layer: int, kept: Tensor) -> Tensor | None:
    return None if gates_LX is None else gates_LX[layer][kept]


def check_names(config: Any, family: Family, source: Shape, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights are not those of a model of this config."""
    expected, found = set(parameter_sizes(config)), set(tensors)
    missing = sorted(expected - found)
    spare = {name for name in found - expected if not name.endswith(family.ignored_buffers)}
    spare -= {f"{family.lm_head}.weight"}
    if missing or spare:
        raise ValueError(
            f"weights of a {family.model_type} model with {source.num_layers} layers do not match its config: "
            f"missing {missing[:5]}, unknown {sorted(spare)[:5]} ({len(missing)} and {len(spare)} in all)"
        )
