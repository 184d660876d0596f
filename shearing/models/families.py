"""The table of model families: names and traits; importable without torch or transformers.

A family says where things are in a model and which config keys hold its sizes. No forward pass is copied
from anywhere: masks and extraction work on Hugging Face's own modules, found by these names.
docs/ADDING_A_FAMILY.md tells how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

NormKind = Literal["rms", "rms_wide", "rms_plus_one", "layer"]

# Config keys that hold the sizes of a Shape, as most families write them.
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
        positions: Table of learned positions, added to the embedding; None without one.
        position_offset: Rows of that table beyond `max_position_embeddings`.
        attention_norm: Norm between the residual stream and attention; None without one.
        mlp_norm: The same for the MLP; None, too, where both read what `attention_norm` puts out (phi).
        attention_post_norm: Norm between attention and its addition to the residual stream; None without one.
        mlp_post_norm: The same for the MLP.
        query: Projections of query, key and value; one name for all three where they are fused.
        qkv_rows: Rows of these projections: `apart` in three modules, `blocks` of all queries, all keys and all
            values, or `heads`, each with its query, key and value.
        gate: Gate projection; None where the MLP has none; the name of `up` where both are fused, gate first.
        mlp: Modules of a layer that make up its MLP, in the order in which they run.
        parallel: Whether attention and MLP read the same residual stream: always, never, or as the config key says.
        dropouts: Of the outputs of attention and MLP: modules of a layer, or its attribute with the rate.
        head_norms: Norms of queries and of keys.
        head_norm_span: What they are over: each `head`, which no gate touches, or `all` heads together.
        norm: `rms`: root mean square, rounded before the weight; `rms_wide`: rounded after it; `rms_plus_one`: the
            weight counts from 1, rounded after it; `layer`: LayerNorm with weight and bias.
        norm_epsilon: Attribute of a norm module that holds its epsilon.
        scaled_embedding: The embedding's output is multiplied by the root of the config's hidden size.
        qkv_bias: Whether query, key and value projections have a bias: always, never, or as the config key says.
        output_bias: The same of the attention's output projection.
        mlp_bias: The same of the MLP projections.
        head_bias: Whether the LM head has one.
        attention: The implementation of attention that trains it here.
        hidden_multiple_of_heads: Hugging Face's config refuses a hidden size that is not a multiple of the heads,
            though the head size is given.
        head_size_from_hidden: The head size is hidden size over heads and nothing else: `always`, or with `long_rope`
            factors, whose number the config class checks against that quotient; None where it is free.
        per_layer_keys: Config keys that hold one entry a layer.
        full_attention_every: Where `layer_types` is left out, every so-manyth layer attends to all tokens and the
            others to a window; None where there is no such rule.
        full_attention_key: Config key that says otherwise.
        window_start_key: Config key of the first layer with a sliding window, where layer types are not listed.
        hidden_keys: Further config keys that must equal the hidden size.
        required: Config keys, each with the only value that masks and extraction know.
        stored_names: Beginnings of weight names in memory, each with how files have it.
        ignored_buffers: Ends of names that old files hold and today's modules compute.
        defaults: What the family's config class takes for a key that a config.json leaves out.
    """

    model_type: str
    architecture: str
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    position_offset: int = 0
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv_rows: Literal["apart", "blocks", "heads"] = "apart"
    output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp: tuple[str, ...] = ("mlp",)
    parallel: bool | str = False
    dropouts: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    head_norm_span: Literal["head", "all"] = "head"
    norm: NormKind = "rms"
    norm_epsilon: str = "variance_epsilon"
    scaled_embedding: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    hidden_multiple_of_heads: bool = False
    head_size_from_hidden: Literal["always", "long_rope"] | None = None
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    full_attention_every: int | None = None
    full_attention_key: str | None = None
    window_start_key: str | None = None
    hidden_keys: tuple[str, ...] = ()
    required: Mapping[str, Any] = field(default_factory=dict, hash=False)
    stored_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    ignored_buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    dimension_keys: Mapping[str, str] = field(default_factory=lambda: DIMENSION_KEYS, hash=False)
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def layer_module(self, layer: int, name: str) -> str:
        """Full name of a module of one layer, as in `model.layers.3.mlp.up_proj`."""
        return f"{self.layers}.{layer}.{name}"

    @property
    def pre_norms(self) -> tuple[str, ...]:
        """Norms of a layer that read the residual stream."""
        return tuple(name for name in (self.attention_norm, self.mlp_norm) if name is not None)

    @property
    def shared_norm(self) -> str | None:
        """The norm that attention and MLP of a layer read together; None where each has its own, or none."""
        return self.attention_norm if self.mlp_norm is None else None

    @property
    def post_norms(self) -> tuple[str, ...]:
        """Norms of a layer that read what attention or MLP put out."""
        return tuple(name for name in (self.attention_post_norm, self.mlp_post_norm) if name is not None)


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


_GEMMA: Mapping[str, Any] = MappingProxyType(
    {
        "norm": "rms_plus_one",
        "norm_epsilon": "eps",
        "scaled_embedding": True,
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
    }
)
_GEMMA_WITH_POST_NORMS: Mapping[str, Any] = MappingProxyType(
    {
        "mlp_norm": "pre_feedforward_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "hidden_multiple_of_heads": True,
        **_GEMMA,
    }
)
_GEMMA_2_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
    }
)

_TABLE = (
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
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        defaults=_defaults(
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            tie_word_embeddings=True,
        ),
        **_GEMMA,
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        attention="eager",  # torch's fused attention has no cap on the scores
        full_attention_every=2,
        defaults=_defaults(vocab_size=256000, **_GEMMA_2_SIZES),
        **_GEMMA_WITH_POST_NORMS,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        full_attention_every=6,
        full_attention_key="sliding_window_pattern",
        defaults=_defaults(vocab_size=262208, **_GEMMA_2_SIZES),
        **_GEMMA_WITH_POST_NORMS,
    ),
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        final_norm="model.final_layernorm",
        mlp_norm=None,
        output="self_attn.dense",
        gate=None,
        up="mlp.fc1",
        down="mlp.fc2",
        parallel=True,
        dropouts=("resid_dropout", "resid_dropout"),
        norm="layer",
        norm_epsilon="eps",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        required=MappingProxyType({"qk_layernorm": False}),
        defaults=_defaults(
            vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, qk_layernorm=False
        ),
    ),
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        qkv_rows="blocks",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
        head_size_from_hidden="long_rope",
        defaults=_defaults(vocab_size=32064, hidden_size=3072, intermediate_size=8192),
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        head_norm_span="all",
        norm="rms_wide",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        defaults=_defaults(vocab_size=50304),
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        qkv_rows="heads",
        output="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        parallel="use_parallel_residual",
        dropouts=("post_attention_dropout", "post_mlp_dropout"),
        norm="layer",
        norm_epsilon="eps",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        head_size_from_hidden="always",
        stored_names=MappingProxyType({"lm_head.": "embed_out."}),
        ignored_buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        dimension_keys=MappingProxyType(
            {name: key for name, key in DIMENSION_KEYS.items() if name not in ("num_kv_heads", "head_size")}
        ),
        defaults=_defaults(
            vocab_size=50432,
            hidden_size=6144,
            intermediate_size=24576,
            num_hidden_layers=44,
            num_attention_heads=64,
            attention_bias=True,
            use_parallel_residual=True,
        ),
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        position_offset=2,
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        output="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        mlp=("fc1", "activation_fn", "fc2"),
        dropouts=("dropout", "dropout"),
        norm="layer",
        norm_epsilon="eps",
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
        head_size_from_hidden="always",
        hidden_keys=("word_embed_proj_dim",),
        required=MappingProxyType(
            {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True}
        ),
        dimension_keys=MappingProxyType(
            {
                "num_layers": "num_hidden_layers",
                "hidden_size": "hidden_size",
                "num_heads": "num_attention_heads",
                "intermediate_size": "ffn_dim",
            }
        ),
        defaults=_defaults(
            vocab_size=50272,
            hidden_size=768,
            ffn_dim=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            enable_bias=True,
            do_layer_norm_before=True,
            _remove_final_layer_norm=False,
            layer_norm_elementwise_affine=True,
        ),
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _TABLE})
