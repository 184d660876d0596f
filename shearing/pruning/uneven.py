"""A smaller model with uneven layers out of a masked one: what an overall sparsity leaves.

The weights are folded as for a target shape. Layers keep numbers of heads and intermediate units of their own, and may
lose attention or MLP alone; one that loses both goes whole. `shearing.models.uneven_modeling` builds such a model.
"""

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

from torch import Tensor

from shearing.models.families import Family
from shearing.models.family import family_of, is_tied, resized_config, shape_of
from shearing.models.parameters import UNEVEN
from shearing.models.shape import Shape
from shearing.pruning.extraction import Fold, Indices, check_names
from shearing.pruning.masks import expand_gates

HALVES = ("attention", "mlp")
SIZES = ("num_heads", "num_kv_heads", "intermediate_size")


def extract_uneven(
    config: Any, family: Family, tensors: Mapping[str, Tensor], z: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]], dict[str, list[Any]]]:
    """The pruned model: its config, its weights one after another, and the source's indices of the units kept.

    Args:
        config: Of the source model.
        family: Of the source model.
        tensors: The source's weights by their names in memory; read one at a time.
        z: Gates by group, from `gates.deterministic(exact=True)` under an overall sparsity; 0 removes.

    Raises:
        ValueError: Weights missing, or left over that the family does not know.
    """
    source = shape_of(config)
    check_names(config, family, source, tensors)
    z = {name: gates.detach().cpu() for name, gates in z.items()}
    kept, halves = _kept(z, source)
    new_config = _config(config, family, kept, halves, source)
    # a half that is absent needs some index to be cut by, before it is left out
    cut = {name: rows if name in ("layer", "hidden") else [row or [0] for row in rows] for name, rows in kept.items()}
    weights = Fold(family, source, tensors, expand_gates(z, source), Indices(cut, source)).weights(is_tied(config))
    absent = tuple(
        f"{family.layer_module(new, name)}."
        for new, layer in enumerate(kept["layer"])
        for half in HALVES
        if layer not in halves[half]
        for name in _modules(family)[half]
    )
    return new_config, ((name, t.contiguous()) for name, t in weights if not name.startswith(absent)), kept


def largest_shape(config: Any) -> Shape:
    """The shape of an uneven model's config, with the largest of its layers' sizes."""
    keys, layers = family_of(config).dimension_keys, config[UNEVEN]["layers"]
    return shape_of(config).model_copy(
        update={name: max((layer[keys[name]] for layer in layers if keys[name] in layer), default=0) for name in SIZES}
    )


def _kept(z: Mapping[str, Tensor], source: Shape) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    """Indices kept by group, rows for every source layer; and the source layers that have attention, and MLP."""
    kept: dict[str, list[Any]] = {}
    for name, gates in z.items():
        rows = [row.nonzero().flatten().tolist() for row in gates.reshape(-1, gates.shape[-1])]
        kept[name] = rows if gates.ndim == 2 else rows[0]
    halves = {half: kept.pop(f"{half}_layer", list(range(source.num_layers))) for half in HALVES}
    kept["layer"] = sorted({layer for layers in halves.values() for layer in layers})
    return kept, halves


def _modules(family: Family) -> dict[str, list[str]]:
    """Of each half its module in a layer, and the norms that are its alone."""
    places = {
        "attention": (family.output, family.attention_norm, family.attention_post_norm),
        "mlp": (family.down, family.mlp_norm, family.mlp_post_norm),
    }
    found = {}
    for half, (writer, *norms) in places.items():
        assert writer is not None
        own = [name for name in norms if name is not None and name != family.shared_norm]
        found[half] = [writer.split(".")[0], *own]
    return found


def _config(
    config: Any, family: Family, kept: Mapping[str, list[Any]], halves: Mapping[str, list[int]], source: Shape
) -> dict[str, Any]:
    ratio = source.num_heads // source.num_kv_heads
    layers = []
    for layer in kept["layer"]:

        def units(group: str, size: int, layer: int = layer) -> int:
            return len(kept[group][layer]) if group in kept else size

        key_values = units("head" if ratio == 1 else "kv_head", source.num_kv_heads)
        heads = key_values if ratio == 1 else key_values * units("head", ratio)
        sizes: dict[str, Any] = {"skip": [half for half in HALVES if layer not in halves[half]]}
        if "attention" not in sizes["skip"]:
            sizes |= {"num_heads": heads, "num_kv_heads": key_values}
        if "mlp" not in sizes["skip"]:
            sizes |= {"intermediate_size": units("intermediate", source.intermediate_size)}
        layers.append(sizes)
    hidden = len(kept["hidden"]) if "hidden" in kept else source.hidden_size
    whole = source.model_copy(update={"num_layers": len(layers), "hidden_size": hidden})
    for name in SIZES:  # the largest, for whoever asks the whole model
        whole = whole.model_copy(update={name: max((s[name] for s in layers if name in s), default=1)})
    if family.hidden_multiple_of_heads and whole.hidden_size % whole.num_heads:
        heads = gcd(whole.hidden_size, whole.num_heads)  # a number that its config class lets pass; no layer reads it
        whole = whole.model_copy(update={"num_heads": heads, "num_kv_heads": heads})
    keys = family.dimension_keys
    named = [{keys.get(name, name): size for name, size in sizes.items() if size} for sizes in layers]
    resized = resized_config(config, whole, kept["layer"])
    return resized | {
        "architectures": [f"Uneven{family.architecture}"],
        "auto_map": {"AutoModelForCausalLM": f"modeling_uneven.Uneven{family.architecture}"},
        UNEVEN: {"path": family.layers, "modules": _modules(family), "layers": named},
    }
