"""Tiny random models of every registered family, for the contract that all of them keep."""

import torch

from shearing.models.family import FAMILIES, family_of
from shearing.models.loading import cast_parameters, new_model
from shearing.models.shape import Shape, TargetShape

VOCABULARY = 61
TOKENS = torch.arange(1, 25).reshape(2, 12) * 7 % VOCABULARY  # none is 0, the padding of generation

MULTI_HEAD = Shape(num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=4, head_size=8, intermediate_size=20)
GROUPED = MULTI_HEAD.model_copy(update={"num_heads": 6, "num_kv_heads": 2})
EXTRAS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
}
# Every way in which heads can go: whole heads, whole groups, queries inside the groups, both, none.
TARGETS = {
    "heads": (MULTI_HEAD, TargetShape(num_layers=2, hidden_size=18, num_heads=3, intermediate_size=13)),
    "groups": (GROUPED, TargetShape(num_layers=2, hidden_size=18, num_heads=3, num_kv_heads=1, intermediate_size=13)),
    "queries": (GROUPED, TargetShape(num_layers=2, hidden_size=16, num_heads=4, intermediate_size=13)),
    "both": (GROUPED, TargetShape(num_layers=2, hidden_size=18, num_heads=2, num_kv_heads=1, intermediate_size=13)),
    "hidden_alone": (GROUPED, TargetShape(hidden_size=12)),
    "layers_alone": (MULTI_HEAD, TargetShape(num_layers=1)),
}


def tiny_config(model_type, shape, tied=False):
    return {
        "model_type": model_type,
        **{key: getattr(shape, name) for name, key in FAMILIES[model_type].dimension_keys.items()},
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    } | EXTRAS[model_type]


def tiny_model(model_type, shape, tied=False, dtype=torch.float32):
    """Weights far from their initial regularity: norms and biases random, so that a gate forgotten there shows."""
    model = new_model(tiny_config(model_type, shape, tied), dtype=torch.float32, seed=11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    assert family_of(model.config).model_type == model_type
    cast_parameters(model, dtype)
    return model.eval()
