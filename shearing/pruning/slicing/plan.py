"""Sizes of a sliced model before anything runs: what is wrong with a request, the config, the parameters.

Importable without torch. A signal is the residual stream at one place: what the first layer reads, and what stands
after every attention and every MLP; after every layer only, where the two are parallel.
"""

import math
from typing import Any

from shearing.models.families import Family
from shearing.models.family import (
    SLICED,
    as_config_dict,
    check_config,
    check_shape,
    family_of,
    head_size_is_quotient,
    is_parallel,
    resized_config,
    shape_of,
)
from shearing.models.parameters import UNEVEN, count_parameters
from shearing.pruning.slicing.config import DEFAULT_FRACTION, SlicingConfig

MULTIPLE = 8  # of dimensions kept for a fraction, as in the published code


def check_slicing(config: Any, slicing: SlicingConfig, path: str = "slicing") -> list[str]:
    """What is wrong with slicing a source model so, one complete message a problem; an empty list if nothing is.

    Args:
        config: Of the source model.
        slicing: What is asked for.
        path: Where it stands in the recipe, for the messages.
    """
    family, problems = family_of(config), check_config(config)
    made = [key for key in (UNEVEN, SLICED) if key in as_config_dict(config)]
    if made:
        problems.append(
            f"The source model's config.json says that its layers are {made[0]} already; only models as their family's "
            "stock class builds them can be sliced. Name the model that it was made of."
        )
    if family.post_norms:
        problems.append(
            f"The source model is of the family {family.model_type}, whose attention and MLP end in a norm of their "
            "own. Such a norm's weight stands between a linear layer and the residual stream, so the stream cannot be "
            "rotated. Slice a model of another family, or shear this one (pipelines/shear.py)."
        )
    return problems or _size_problems(config, family, slicing, path)


def _size_problems(config: Any, family: Family, slicing: SlicingConfig, path: str) -> list[str]:
    shape = shape_of(config)
    given = [name for name in ("fraction", "hidden_size", "schedule") if getattr(slicing, name) is not None]
    if len(given) > 1:
        return [f"{path} has {' and '.join(given)}; allowed: one of them. Remove all but one."]
    problems = []
    schedule = slicing.schedule
    if schedule is not None and len(schedule) != shape.num_layers:
        problems.append(
            f"{path}.schedule has {len(schedule)} entries for {shape.num_layers} layers; allowed: one a layer. "
            f"Give {shape.num_layers}."
        )
    wrong = [fraction for fraction in schedule or [] if not 0 <= fraction < 1]
    if wrong:
        problems.append(f"{path}.schedule has {wrong}; allowed: at least 0 and less than 1. Change these entries.")
    if slicing.hidden_size is not None and slicing.hidden_size > shape.hidden_size:
        problems.append(
            f"{path}.hidden_size = {slicing.hidden_size} is more than the source's {shape.hidden_size}. "
            f"Set {path}.hidden_size={shape.hidden_size} or less."
        )
    if problems:
        return problems
    if slicing.rotation == "shared":
        return _shared_problems(config, family, slicing, path)
    return _nothing_kept(min(signal_sizes(config, slicing)), slicing, path)


def _nothing_kept(kept: int, slicing: SlicingConfig, path: str) -> list[str]:
    if kept:
        return []
    key = "schedule" if slicing.schedule is not None else "fraction"
    return [
        f"{path}.{key} keeps no dimension: what stays is rounded down to a multiple of {MULTIPLE}. Set a smaller "
        f"{path}.{key}, or {path}.hidden_size."
    ]


def _shared_problems(config: Any, family: Family, slicing: SlicingConfig, path: str) -> list[str]:
    if head_size_is_quotient(family, config):
        return [
            f"{path}.rotation = shared leaves a plain model, and in Hugging Face's {family.architecture} the head size "
            "is the hidden size over the heads: with fewer hidden dimensions its heads would have to shrink; allowed "
            f"for this model: per_signal. Set {path}.rotation=per_signal."
        ]
    if slicing.schedule is not None:
        return [
            f"{path}.schedule gives signals sizes of their own, and a plain model has one hidden size. "
            f"Set {path}.schedule=null and {path}.fraction, or {path}.rotation=per_signal."
        ]
    kept = shared_size(config, slicing)
    if family.norm == "layer" and kept == 1:
        return [
            f"{path}.hidden_size = 1 leaves nothing of a LayerNorm, which subtracts the mean. "
            f"Set {path}.hidden_size=2 or more."
        ]
    if not kept:
        return _nothing_kept(kept, slicing, path)
    return check_shape(family, shape_of(config).model_copy(update={"hidden_size": kept}), path)


def kept_size(fraction: float, size: int, multiple: int = MULTIPLE) -> int:
    """Dimensions that a fraction leaves of `size`: rounded down to a multiple; all of them for a fraction of 0.

    Source: arXiv 2401.15024, released code.
    """
    if fraction == 0:
        return size
    return math.floor((1 - fraction) * size + 1e-9) // multiple * multiple


def shared_size(config: Any, slicing: SlicingConfig) -> int:
    """The hidden size of the plain model that a shared rotation leaves; a multiple of the heads where it must be."""
    family, shape = family_of(config), shape_of(config)
    if slicing.hidden_size is not None:
        return slicing.hidden_size
    multiple = math.lcm(MULTIPLE, shape.num_heads) if family.hidden_multiple_of_heads else MULTIPLE
    return kept_size(_fraction(slicing), shape.hidden_size, multiple)


def _fraction(slicing: SlicingConfig) -> float:
    return DEFAULT_FRACTION if slicing.fraction is None else slicing.fraction


def halves_of(config: Any) -> tuple[str, ...]:
    """The parts of a layer after each of which there is a signal."""
    return ("both",) if is_parallel(family_of(config), config) else ("attention", "mlp")


def signal_sizes(config: Any, slicing: SlicingConfig) -> list[int]:
    """What stays of every signal with one rotation each, in the order of the model; the last is full without `head`."""
    shape, halves = shape_of(config), len(halves_of(config))
    if slicing.hidden_size is not None:
        kept = [slicing.hidden_size] * shape.num_layers
    else:
        schedule = slicing.schedule or [_fraction(slicing)] * shape.num_layers
        kept = [kept_size(fraction, shape.hidden_size) for fraction in schedule]
    last = kept[-1] if slicing.head else shape.hidden_size
    return [*(size for size in kept for _ in range(halves)), last]


def sliced_config(config: Any, slicing: SlicingConfig) -> dict[str, Any]:
    """The config.json of the result: of a plain model with a shared rotation, else one that `sliced_modeling` reads.

    Args:
        config: Of the source model; `check_slicing` finds nothing wrong with it.
        slicing: What is asked for.
    """
    family, shape = family_of(config), shape_of(config)
    untied = as_config_dict(config) | {"tie_word_embeddings": False}
    if slicing.rotation == "shared":
        return resized_config(untied, shape.model_copy(update={"hidden_size": shared_size(config, slicing)}))
    sizes = signal_sizes(config, slicing)
    step = len(halves_of(config))
    layers = [_layer(family, sizes[step * i : step * (i + 1) + 1]) for i in range(shape.num_layers)]
    description = {
        "size": shape.hidden_size,
        "first": sizes[0],
        "last": sizes[-1],
        "names": module_names(config),
        "layers": layers,
    }
    return untied | {
        "architectures": [f"Sliced{family.architecture}"],
        "auto_map": {"AutoModelForCausalLM": f"modeling_sliced.Sliced{family.architecture}"},
        SLICED: description,
    }


def _layer(family: Family, sizes: list[int]) -> dict[str, Any]:
    """Sizes of one layer from those of the signals that it reads, has inside where it has one, and puts out."""
    first, last = sizes[0], sizes[-1]
    inside, after = (first, last) if len(sizes) == 2 else (sizes[1], sizes[1])
    residuals = {"residual": [first, last]}
    if len(sizes) == 3:
        residuals = {"attention_residual": [first, inside], "mlp_residual": [inside, last]}
    readers = dict.fromkeys(attention_readers(family), first) | dict.fromkeys(mlp_readers(family), inside)
    return {"readers": readers, "writers": {family.output: after, family.down: last}, "residuals": residuals}


def attention_readers(family: Family) -> list[str]:
    """Linear layers of attention that read the residual stream through a norm."""
    return list(dict.fromkeys((family.query, family.key, family.value)))


def mlp_readers(family: Family) -> list[str]:
    """Linear layers of the MLP that read the residual stream through a norm."""
    return list(dict.fromkeys(name for name in (family.gate, family.up) if name is not None))


def module_names(config: Any) -> dict[str, Any]:
    """Where a sliced model of this family has its modules, as its modelling file reads them."""
    family = family_of(config)
    return {
        "embeddings": [name for name in (family.embedding, family.positions) if name is not None],
        "layers": family.layers,
        "final_norm": family.final_norm,
        "head": family.lm_head,
        "attention": family.output.split(".")[0],
        "mlp": list(family.mlp),
        "attention_norm": family.attention_norm,
        "mlp_norm": family.mlp_norm or family.attention_norm,
        "norm_epsilon": family.norm_epsilon,
        "dropouts": list(family.dropouts),
        "parallel": is_parallel(family, config),
        "reader_bias": family.norm == "layer",
    }


def sliced_parameters(config: Any, slicing: SlicingConfig) -> int:
    """All parameters of the result, residual matrices included; embedding and head count apart.

    Args:
        config: Of the source model.
        slicing: What is asked for.
    """
    return count_parameters(sliced_config(config, slicing))


def fraction_for(config: Any, slicing: SlicingConfig, parameters: int) -> float:
    """The smallest fraction whose result has at most so many parameters; all else as in `slicing`.

    Raises:
        ValueError: No fraction leaves so few. Residual matrices and an LM head that was tied can make a sliced model
            larger than its source.
    """
    size = shape_of(config).hidden_size
    sizes = range(size // MULTIPLE * MULTIPLE, 0, -MULTIPLE)
    for fraction in [0.0, *(1 - kept / size for kept in sizes if kept < size)]:
        asked = slicing.model_copy(update={"fraction": fraction, "hidden_size": None, "schedule": None})
        if not check_slicing(config, asked) and sliced_parameters(config, asked) <= parameters:
            return fraction
    raise ValueError(f"no fraction leaves {parameters} parameters or fewer")
