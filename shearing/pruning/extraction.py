"""A smaller model out of a masked one: units kept, gates folded into the weights, layers renumbered.

The formulas are those of `shearing.pruning.masks`, so the masked model at the target's size and the extracted one are
the same function. Shape suffixes as there; V is the vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shearing.models.family import Family, has_bias, is_tied, resized_config, shape_of
from shearing.models.shape import Shape
from shearing.pruning.masks import ExpandedGates, expand_gates, gated_vector, gated_weight
from shearing.pruning.target import gate_groups

IGNORED_BUFFERS = ("rotary_emb.inv_freq",)  # in some old checkpoints; computed from the config since


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
        ValueError: An open gate whose unit does not fit the target: the gates are not at the exact size.
    """
    specs = gate_groups(source, target, z.keys())
    kept: dict[str, list[Any]] = {}
    for name, gates in z.items():
        spec = specs[name]
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


class _Indices:
    """Rows and columns that stay, for every source layer."""

    def __init__(self, kept: Mapping[str, list[Any]], source: Shape) -> None:
        self.layers: list[int] = kept.get("layer", list(range(source.num_layers)))
        self.hidden = torch.tensor(kept.get("hidden", list(range(source.hidden_size))))
        self._kept, self._source = kept, source

    def intermediate(self, layer: int) -> Tensor:
        """Intermediate units of a layer."""
        return torch.tensor(self._of("intermediate", layer, self._source.intermediate_size))

    def key_values(self, layer: int) -> Tensor:
        """Rows of the key and value projections."""
        if self._multi_head:
            return self.queries(layer)
        return self._head_rows(self._of("kv_head", layer, self._source.num_kv_heads))

    def queries(self, layer: int) -> Tensor:
        """Rows of the query projection, columns of the output projection: groups in order, their queries in order."""
        ratio = self._source.num_heads // self._source.num_kv_heads
        if self._multi_head:
            return self._head_rows(self._of("head", layer, self._source.num_heads))
        queries = self._of("head", layer, ratio)
        groups = self._of("kv_head", layer, self._source.num_kv_heads)
        return self._head_rows([group * ratio + query for group in groups for query in queries])

    @property
    def _multi_head(self) -> bool:
        return self._source.num_heads == self._source.num_kv_heads

    def _of(self, group: str, layer: int, size: int) -> list[int]:
        return self._kept[group][layer] if group in self._kept else list(range(size))

    def _head_rows(self, heads: list[int]) -> Tensor:
        size = self._source.head_size
        return (torch.tensor(heads)[:, None] * size + torch.arange(size)).reshape(-1)


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
        tensors: The source's weights by their Hugging Face names; read one at a time, so a lazy mapping will do.
        z: Gates by group at the target's exact size, from `gates.deterministic(exact=True)`.
        target: Full target shape, from `shearing.pruning.target.target_shape`.
        dtype: Of the weights written; default each weight's own. Products are formed in float32.

    Raises:
        ValueError: Gates not at the exact size; weights missing, or left over that the family does not know.
    """
    if family.norm != "rms":
        raise NotImplementedError(f"extraction of {family.norm!r} norms (family {family.model_type}) is not built yet")
    source = shape_of(config)
    indices = _Indices(kept_units(z, source, target), source)
    gates = expand_gates({name: gate.detach().cpu() for name, gate in z.items()}, source)
    _check_names(config, family, source, tensors)
    new_config = resized_config(config, target, indices.layers)
    if dtype is not None:
        new_config.pop("torch_dtype", None)
        new_config["dtype"] = str(dtype).removeprefix("torch.")
    weights = _fold(family, tensors, gates, indices, is_tied(config))
    return new_config, ((name, tensor.to(dtype or tensor.dtype).contiguous()) for name, tensor in weights)


def _fold(
    family: Family, tensors: Mapping[str, Tensor], gates: ExpandedGates, indices: _Indices, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    hidden = indices.hidden
    hidden_gates = None if gates.hidden_D is None else gates.hidden_D[hidden]
    embedding, head, final_norm = (f"{name}.weight" for name in (family.embedding, family.lm_head, family.final_norm))
    yield embedding, gated_vector(tensors[embedding][:, hidden], hidden_gates)
    for new, layer in enumerate(indices.layers):
        yield from _fold_layer(family, tensors, gates, indices, (layer, new))
    # Logits are E (w z n) of the normed stream n. Where the head is the embedding table, that table carries the z
    # already, and a final norm that carried it too would apply it twice.
    yield final_norm, gated_vector(tensors[final_norm][hidden], None if tied else hidden_gates)
    if not tied:
        yield head, tensors[head][:, hidden]


def _fold_layer(
    family: Family,
    tensors: Mapping[str, Tensor],
    gates: ExpandedGates,
    indices: _Indices,
    numbers: tuple[int, int],
) -> Iterator[tuple[str, Tensor]]:
    layer, new = numbers
    hidden, intermediate = indices.hidden, indices.intermediate(layer)
    queries, key_values = indices.queries(layer), indices.key_values(layer)

    def read(name: str) -> Tensor | None:
        full = family.layer_module(layer, name)
        return tensors.get(full)

    def gate(gates_LX: Tensor | None, kept: Tensor) -> Tensor | None:
        return None if gates_LX is None else gates_LX[layer][kept]

    hidden_gates = None if gates.hidden_D is None else gates.hidden_D[hidden]
    folded: dict[str, Tensor | None] = {}
    for norm in (family.attention_norm, family.mlp_norm):
        folded[f"{norm}.weight"] = gated_vector(
            tensors[family.layer_module(layer, f"{norm}.weight")][hidden], hidden_gates
        )
    for norm in family.head_norms:
        folded[f"{norm}.weight"] = read(f"{norm}.weight")
    readers = {family.query: queries, family.key: key_values, family.value: key_values}
    readers |= {family.gate: intermediate, family.up: intermediate}
    for name, rows in readers.items():
        weight, bias = tensors[family.layer_module(layer, f"{name}.weight")], read(f"{name}.bias")
        folded[f"{name}.weight"] = weight[rows][:, hidden]
        folded[f"{name}.bias"] = None if bias is None else bias[rows]
    out = gate(gates.out_LD, hidden)
    writers = ((family.output, queries, gates.head_LI), (family.down, intermediate, gates.intermediate_LF))
    for name, columns, inner in writers:
        weight, bias = tensors[family.layer_module(layer, f"{name}.weight")], read(f"{name}.bias")
        folded[f"{name}.weight"] = gated_weight(weight[hidden][:, columns], out, gate(inner, columns))
        folded[f"{name}.bias"] = None if bias is None else gated_vector(bias[hidden], out)
    for name, tensor in folded.items():
        if tensor is not None:
            yield family.layer_module(new, name), tensor


def expected_names(config: Any, family: Family) -> set[str]:
    """Names of all weights of a model of this config, without the LM head where it is the embedding table."""
    biased = {
        family.query: family.qkv_bias,
        family.key: family.qkv_bias,
        family.value: family.qkv_bias,
        family.output: family.output_bias,
        family.gate: family.mlp_bias,
        family.up: family.mlp_bias,
        family.down: family.mlp_bias,
    }
    inside = {f"{name}.weight" for name in (family.attention_norm, family.mlp_norm, *family.head_norms, *biased)}
    inside |= {f"{name}.bias" for name, trait in biased.items() if has_bias(family, config, trait)}
    names = {f"{family.embedding}.weight", f"{family.final_norm}.weight"}
    if not is_tied(config):
        names.add(f"{family.lm_head}.weight")
    return names | {family.layer_module(layer, name) for layer in range(shape_of(config).num_layers) for name in inside}


def _check_names(config: Any, family: Family, source: Shape, tensors: Mapping[str, Tensor]) -> None:
    expected, found = expected_names(config, family), set(tensors)
    missing = sorted(expected - found)
    spare = {name for name in found - expected if not name.endswith(IGNORED_BUFFERS)}
    spare -= {f"{family.lm_head}.weight"}
    if missing or spare:
        raise ValueError(
            f"weights of a {family.model_type} model with {source.num_layers} layers do not match its config: "
            f"missing {missing[:5]}, unknown {sorted(spare)[:5]} ({len(missing)} and {len(spare)} in all)"
        )
