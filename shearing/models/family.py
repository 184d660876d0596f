"""What a model's config says, read by the table of its family; importable without torch or transformers."""

from collections.abc import Mapping
from typing import Any

from shearing.errors import UserError
from shearing.models.families import FAMILIES, Family
from shearing.models.shape import Shape

SLICED = "sliced"  # key of a config whose residual stream was sliced; see `shearing.models.sliced_modeling`


def as_config_dict(config: Any) -> dict[str, Any]:
    """The config as a plain dict, from a dict or from a `transformers.PreTrainedConfig`."""
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def family_of(config: Any) -> Family:
    """The family of a model's config (a config.json's dict, or a transformers config).

    Raises:
        UserError: The model type is missing or not registered.
    """
    model_type = str(as_config_dict(config).get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(
        f"The source model's config.json says model_type = {model_type}, a family that is not registered; "
        f"known: {', '.join(FAMILIES)}. Name another source model, or add this family to the table in "
        "shearing/models/families.py as docs/ADDING_A_FAMILY.md tells."
    )


def config_value(family: Family, config: Any, key: str) -> Any:
    """A key of a config, or what the family's config class takes where the key is left out (None if it has none)."""
    return as_config_dict(config).get(key, family.defaults.get(key))


def shape_of(config: Any) -> Shape:
    """The shape that a config describes; a plain config.json's dict will do.

    Raises:
        UserError: Unknown family.
    """
    family = family_of(config)
    sizes = {name: config_value(family, config, key) for name, key in family.dimension_keys.items()}
    if sizes.get("num_kv_heads") is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes.get("head_size") is None:
        sizes["head_size"] = sizes["hidden_size"] // sizes["num_heads"]
    return Shape(**sizes)


def check_config(config: Any) -> list[str]:
    """What in a registered family's config no mask or extraction knows, one message a problem; empty if nothing is."""
    family, values = family_of(config), as_config_dict(config)
    hidden_size = config_value(family, values, family.dimension_keys["hidden_size"])
    wanted = {key: hidden_size for key in family.hidden_keys if values.get(key) is not None} | dict(family.required)
    return [
        f"The source model's config.json says {key} = {config_value(family, values, key)}, a variant of "
        f"{family.model_type} that cannot be pruned here; allowed: {value}. Name another source model."
        for key, value in wanted.items()
        if config_value(family, values, key) != value
    ]


def check_shape(family: Family, shape: Shape, path: str) -> list[str]:
    """What keeps a model of this shape from being built, one message a problem; an empty list if nothing does.

    Args:
        family: Of the model.
        shape: Asked for.
        path: Where the shape stands in the recipe, for the messages.
    """
    problems = []
    if shape.num_heads % shape.num_kv_heads:
        allowed = [count for count in range(1, shape.num_heads + 1) if shape.num_heads % count == 0]
        problems.append(
            f"{path}.num_heads = {shape.num_heads} is not a multiple of num_kv_heads = {shape.num_kv_heads}; "
            f"allowed for num_kv_heads: {', '.join(map(str, allowed))}. Set {path}.num_kv_heads={shape.num_heads}."
        )
    if shape.head_size % 2:
        problems.append(
            f"{path}.head_size = {shape.head_size} is odd, but a rotary embedding turns pairs of dimensions. "
            f"Set {path}.head_size={shape.head_size + 1}."
        )
    if family.hidden_multiple_of_heads and shape.hidden_size % shape.num_heads:
        larger = -(-shape.hidden_size // shape.num_heads) * shape.num_heads
        problems.append(
            f"{path}.hidden_size = {shape.hidden_size} is not a multiple of num_heads = {shape.num_heads}, "
            f"which Hugging Face's {family.architecture} needs. Set {path}.hidden_size={larger}."
        )
    return problems


def head_size_is_quotient(family: Family, config: Any) -> bool:
    """Whether the head size of such a model is its hidden size over its heads, and can be nothing else."""
    if family.head_size_from_hidden != "long_rope":
        return family.head_size_from_hidden == "always"
    values = as_config_dict(config)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return "short_factor" in rope or "long_factor" in rope


def vocabulary_of(config: Any) -> int:
    """Rows of the embedding table."""
    return config_value(family_of(config), config, "vocab_size")


def is_tied(config: Any) -> bool:
    """Whether the LM head is the embedding table."""
    return bool(config_value(family_of(config), config, "tie_word_embeddings"))


def has_bias(family: Family, config: Any, trait: bool | str) -> bool:
    """Whether a projection has a bias, from a family's bias trait: fixed, or named by a config key."""
    return trait if isinstance(trait, bool) else bool(config_value(family, config, trait))


def is_parallel(family: Family, config: Any) -> bool:
    """Whether attention and MLP of a layer read the same residual stream."""
    trait = family.parallel
    return trait if isinstance(trait, bool) else bool(config_value(family, config, trait))


def resized_config(config: Any, target: Shape, kept_layers: list[int] | None = None) -> dict[str, Any]:
    """A config of another shape, all else as it was: vocabulary, rotary embedding, special tokens, tying.

    Args:
        config: Of the source model: dict or transformers config.
        target: Its sizes replace the source's. The head size is written out, so that the hidden size may shrink alone.
        kept_layers: Source layers that stay, ascending; entries that the config holds for each layer are cut with them.
            None where the target has the source's layers.
    """
    family, source = family_of(config), shape_of(config)
    layers = list(range(source.num_layers)) if kept_layers is None else list(kept_layers)
    assert len(layers) == target.num_layers
    resized = as_config_dict(config)
    resized |= {key: getattr(target, name) for name, key in family.dimension_keys.items()}
    resized |= {key: target.hidden_size for key in family.hidden_keys if resized.get(key) is not None}
    if family.full_attention_every is not None and resized.get("layer_types") is None:
        resized["layer_types"] = _layer_types_by_rule(family, resized, source.num_layers)
    for key in family.per_layer_keys:
        if resized.get(key) is not None:
            resized[key] = [resized[key][layer] for layer in layers]
    if family.window_start_key is not None and resized.get(family.window_start_key) is not None:
        start = resized[family.window_start_key]
        resized[family.window_start_key] = sum(layer < start for layer in layers)
    resized.setdefault("architectures", [family.architecture])
    resized.pop("auto_map", None)  # names modelling files that the new directory does not hold, nor needs
    assert shape_of(resized) == target, f"no {family.model_type} model has the shape {target}"
    return resized


def _layer_types_by_rule(family: Family, config: Mapping[str, Any], layers: int) -> list[str]:
    every = family.full_attention_every
    if family.full_attention_key is not None:
        every = config.get(family.full_attention_key, every)
    assert every is not None
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def stored_name(config: Any, name: str) -> str:
    """How files name a weight that is `name` in memory; the same for a family that is not registered."""
    return _renamed(name, _stored_names(config))


def memory_name(config: Any, name: str) -> str:
    """How a model in memory names a weight that files have as `name`; a file that says it so already is taken too."""
    return _renamed(name, {stored: name for name, stored in _stored_names(config).items()})


def _stored_names(config: Any) -> Mapping[str, str]:
    values = as_config_dict(config)
    family = FAMILIES.get(str(values.get("model_type")))
    # transformers renames weights of stock classes alone
    return {} if family is None or SLICED in values else family.stored_names


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def llama_config(
    shape: Shape,
    vocabulary: int,
    max_positions: int,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """The config.json of a llama model of a shape, for models trained from nothing.

    Args:
        shape: Its sizes.
        vocabulary: Rows of the embedding table.
        max_positions: Longest sequence in tokens.
        bos_token_id: Begin-of-text token.
        eos_token_id: End-of-text token.
        pad_token_id: Padding token.
        tied: Whether the LM head is the embedding table.
    """
    family = FAMILIES["llama"]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(shape, name) for name, key in family.dimension_keys.items()},
        "vocab_size": vocabulary,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "float32",
    }
