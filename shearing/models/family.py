"""Model families as a table of names and traits; importable without torch or transformers.

A family says where things are in a model and which config keys hold its sizes. No forward pass is copied
from anywhere: masks and extraction work on Hugging Face's own modules, found by these names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from shearing.errors import UserError
from shearing.models.shape import Shape

# Config keys that hold the sizes of a Shape, as every registered family writes them.
DIMENSION_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "intermediate_size": "intermediate_size",
    }
)


@dataclass(frozen=True)
class Family:
    """Names and traits of one model family. Module names of a layer are relative to that layer.

    Attributes:
        qkv_bias: Whether query, key and value projections have a bias: always, never, or as the config key says.
        output_bias: The same of the attention's output projection.
        mlp_bias: The same of the three MLP projections.
        head_norms: Norms over the head dimension (of queries and keys); no gate touches them.
        hidden_multiple_of_heads: Hugging Face's config refuses a hidden size that is not a multiple of the heads,
            though the head size is given.
        per_layer_keys: Config keys that hold one entry a layer.
        window_start_key: Config key of the first layer with a sliding window, where layer types are not listed.
        defaults: What the family's config class takes for a key that a config.json leaves out.
    """

    model_type: str
    architecture: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    head_norms: tuple[str, ...] = ()
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_epsilon: str = "variance_epsilon"
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    hidden_multiple_of_heads: bool = False
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    window_start_key: str | None = None
    dimension_keys: Mapping[str, str] = field(default_factory=lambda: DIMENSION_KEYS, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def layer_module(self, layer: int, name: str) -> str:
        """Full name of a module of one layer, as in `model.layers.3.mlp.up_proj`."""
        return f"{self.layers}.{layer}.{name}"


def _defaults(**changed: Any) -> Mapping[str, Any]:
    common = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "tie_word_embeddings": False,
    }
    return MappingProxyType(common | changed)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                model_type="llama",
                architecture="LlamaForCausalLM",
                qkv_bias="attention_bias",
                output_bias="attention_bias",
                mlp_bias="mlp_bias",
                hidden_multiple_of_heads=True,
                defaults=_defaults(),
            ),
            Family(
                model_type="mistral",
                architecture="MistralForCausalLM",
                defaults=_defaults(intermediate_size=14336, num_key_value_heads=8),
            ),
            Family(
                model_type="qwen2",
                architecture="Qwen2ForCausalLM",
                qkv_bias=True,
                window_start_key="max_window_layers",
                defaults=_defaults(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32),
            ),
            Family(
                model_type="qwen3",
                architecture="Qwen3ForCausalLM",
                qkv_bias="attention_bias",
                output_bias="attention_bias",
                head_norms=("self_attn.q_norm", "self_attn.k_norm"),
                window_start_key="max_window_layers",
                defaults=_defaults(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, head_dim=128),
            ),
        )
    }
)


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
        f"known: {', '.join(FAMILIES)}. Name another source model, or add a Family with its module names and traits "
        "to FAMILIES in shearing/models/family.py."
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
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes["head_size"] is None:
        sizes["head_size"] = sizes["hidden_size"] // sizes["num_heads"]
    return Shape(**sizes)


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


def vocabulary_of(config: Any) -> int:
    """Rows of the embedding table."""
    return config_value(family_of(config), config, "vocab_size")


def is_tied(config: Any) -> bool:
    """Whether the LM head is the embedding table."""
    return bool(config_value(family_of(config), config, "tie_word_embeddings"))


def has_bias(family: Family, config: Any, trait: bool | str) -> bool:
    """Whether a projection has a bias, from a family's bias trait: fixed, or named by a config key."""
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
    for key in family.per_layer_keys:
        if resized.get(key) is not None:
            resized[key] = [resized[key][layer] for layer in layers]
    if family.window_start_key is not None and resized.get(family.window_start_key) is not None:
        start = resized[family.window_start_key]
        resized[family.window_start_key] = sum(layer < start for layer in layers)
    resized.setdefault("architectures", [family.architecture])
    return resized


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
