"""Tiny random models of every registered family and its variants, for the contract that all of them keep."""

import torch

from shearing.models.families import FAMILIES
from shearing.models.family import family_of
from shearing.models.loading import cast_parameters, new_model
from shearing.models.shape import Shape, TargetShape

VOCABULARY = 61
TOKENS = torch.arange(1, 25).reshape(2, 12) * 7 % VOCABULARY  # none is 0, the padding of generation

MULTI_HEAD = Shape(num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=4, head_size=8, intermediate_size=20)
GROUPED = MULTI_HEAD.model_copy(update={"num_heads": 6, "num_kv_heads": 2})
SQUARE = MULTI_HEAD.model_copy(update={"hidden_size": 32})  # hidden size over heads is the head size

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
PARTIAL_ROPE = {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 0.75}}
LLAMA_3_ROPE = {
    "rope_theta": 5000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
LONG_ROPE = {
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
    "rope_theta": 5000.0,
    "rope_scaling": {
        "type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.0, 2.0, 4.0],
    },
}
GEMMA_3_ROPE = {
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
PYTHIA_ROPE = {"rotary_pct": 0.5, "rotary_emb_base": 5000}
GEMMA_2 = {"query_pre_attn_scalar": 8, "sliding_window": 5}
NO_DROPOUT = {"dropout": 0.0}
# Each variant of a family with what its config.json says beside the sizes.
VARIANTS = {
    "llama": ROPE | {"attention_bias": True, "mlp_bias": True},
    "llama 3": LLAMA_3_ROPE,
    "mistral": ROPE | {"sliding_window": 5},
    "qwen2": ROPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": ROPE | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "gemma": ROPE,
    "gemma2": ROPE | GEMMA_2,
    "gemma3_text": GEMMA_2 | GEMMA_3_ROPE | {"sliding_window_pattern": 2, "attention_bias": True},
    "phi": PARTIAL_ROPE,
    "phi3": PARTIAL_ROPE | {"sliding_window": 5},
    "phi3 long": LONG_ROPE,
    "olmo2": ROPE | {"attention_bias": True},
    "gpt_neox": PARTIAL_ROPE,
    "gpt_neox sequential": PYTHIA_ROPE | {"use_parallel_residual": False, "attention_bias": False},
    "opt": NO_DROPOUT,
    "opt unbiased": NO_DROPOUT | {"enable_bias": False},
}
QUOTIENT = ("phi3 long", "gpt_neox", "opt")  # beginnings of variants whose head size is hidden size over heads

# Every way in which heads can go: whole heads, whole groups, queries inside the groups, both, none.
FREE_TARGETS = {
    "heads": (MULTI_HEAD, TargetShape(num_layers=2, hidden_size=18, num_heads=3, intermediate_size=13)),
    "groups": (GROUPED, TargetShape(num_layers=2, hidden_size=18, num_heads=3, num_kv_heads=1, intermediate_size=13)),
    "queries": (GROUPED, TargetShape(num_layers=2, hidden_size=16, num_heads=4, intermediate_size=13)),
    "both": (GROUPED, TargetShape(num_layers=2, hidden_size=18, num_heads=2, num_kv_heads=1, intermediate_size=13)),
    "hidden_alone": (GROUPED, TargetShape(hidden_size=12)),
    "layers_alone": (MULTI_HEAD, TargetShape(num_layers=1)),
}
QUOTIENT_TARGETS = {
    "heads": (SQUARE, TargetShape(num_layers=2, hidden_size=24, num_heads=3, intermediate_size=13)),
    "heads_alone": (SQUARE, TargetShape(hidden_size=16, num_heads=2)),
    "intermediate_alone": (SQUARE, TargetShape(intermediate_size=11)),
    "layers_alone": (SQUARE, TargetShape(num_layers=1)),
}


def targets_of(variant):
    """Pairs of a source's shape and a target within it, by name."""
    return QUOTIENT_TARGETS if variant.startswith(QUOTIENT) else FREE_TARGETS


def widest_of(variant):
    """The target that touches most of a variant."""
    targets = targets_of(variant)
    return targets.get("both", targets["heads"])


def shapes_of(variant):
    """Shapes that a variant can have, with multi-head and with grouped attention."""
    return (SQUARE,) if variant.startswith(QUOTIENT) else (MULTI_HEAD, GROUPED)


def tiny_config(variant, shape, tied=False):
    """The config.json of a variant; head sizes that are hidden over heads are not in it."""
    model_type = variant.split()[0]
    return {
        "model_type": model_type,
        **{key: getattr(shape, name) for name, key in FAMILIES[model_type].dimension_keys.items()},
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    } | VARIANTS[variant]


def tiny_model(variant, shape, tied=False, dtype=torch.float32):
    """Weights far from their initial regularity: norms and biases random, so that a gate forgotten there shows."""
    model = new_model(tiny_config(variant, shape, tied), dtype=torch.float32, seed=11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    assert family_of(model.config).model_type == variant.split()[0]
    cast_parameters(model, dtype)
    return model.eval()
