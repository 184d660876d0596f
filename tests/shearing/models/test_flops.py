"""Model FLOPs against what a model's own matrix products came to."""

import pytest
import torch
from tiny_models import TOKENS, VARIANTS, shapes_of, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from shearing.models.flops import peak_flops_per_s, training_flops_per_token
from shearing.models.loading import new_model
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import sliced_config


def check_flops(config):
    """Against every product that PyTorch counts in a forward and a backward pass."""
    model = new_model(config, dtype=torch.float32, seed=1)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    expected = counter.get_total_flops() / TOKENS.numel() + 6 * vectors  # norms and biases: in N, and no products
    assert training_flops_per_token(config, TOKENS.shape[1]) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma", "phi3", "gpt_neox", "opt"])
def test_flops_of_every_product_forward_and_backward(variant, tied):
    """A tied head left out, positions counted as products, key/value heads counted as query heads."""
    assert variant in VARIANTS
    check_flops(tiny_config(variant, shapes_of(variant)[-1], tied))


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_a_sliced_model_has_tables_of_its_own_width(variant):
    """The whole model's embedding taken off a narrow one, residual matrices left out."""
    check_flops(sliced_config(tiny_config(variant, shapes_of(variant)[0]), SlicingConfig(hidden_size=16)))


def test_uneven_layers_have_heads_of_their_own():
    """Attention counted in layers that have none."""
    config = tiny_config("llama", shapes_of("llama")[0])
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    layers = [sizes | {"skip": []}, {"intermediate_size": 20, "skip": ["attention"]}, sizes | {"skip": ["mlp"]}]
    config["uneven"] = {
        "layers": layers,
        "modules": {"attention": ["self_attn"], "mlp": ["mlp"]},
        "path": "model.layers",
    }
    assert training_flops_per_token(config, 7) - training_flops_per_token(config, 6) == 12 * 4 * 8


def test_published_size():
    """Units wrong by a power of ten: Llama 2 7B has 6.61e9 parameters that multiply, at 4,096 tokens."""
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False}
    n = 6_738_415_616 - 32000 * 4096
    assert training_flops_per_token(config, 4096) == 6 * n + 12 * 32 * 32 * 128 * 4096


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_a_name_means_one_device(name, peak):
    """An L40S taken for an L4; a device that nobody knows given a figure."""
    assert peak_flops_per_s(name, "bfloat16") == peak
    assert peak_flops_per_s(name, "float32") is None
