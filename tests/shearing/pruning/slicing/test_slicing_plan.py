"""Sizes, refusals and counts before anything runs."""

import pytest
from tiny_models import GROUPED, MULTI_HEAD, SQUARE, tiny_config

from shearing.models.loading import new_model
from shearing.models.parameters import count_parameters, prunable_parameters
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import (
    check_slicing,
    fraction_for,
    kept_size,
    signal_sizes,
    sliced_config,
    sliced_parameters,
)

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("fraction", "size", "kept"), [(0.25, 4096, 3072), (0.3, 4096, 2864), (0.2, 768, 608), (0.9, 80, 8), (0, 20, 20)]
)
def test_kept_sizes_are_the_published_ones(fraction, size, kept):
    assert kept_size(fraction, size) == kept


def test_signals_of_a_schedule():
    """Catches a signal that takes its size from the wrong layer."""
    config = tiny_config("llama", SQUARE)
    schedule = {"schedule": [0.25, 0.5, 0.75]}
    assert signal_sizes(config, SlicingConfig(**schedule)) == [24, 24, 16, 16, 8, 8, 32]
    assert signal_sizes(config, SlicingConfig(head=True, **schedule)) == [24, 24, 16, 16, 8, 8, 8]
    assert signal_sizes(tiny_config("phi", SQUARE), SlicingConfig(**schedule)) == [24, 16, 8, 32]
    assert signal_sizes(config, SlicingConfig()) == [24] * 6 + [32]


@pytest.mark.parametrize("variant", ["llama", "phi", "opt unbiased", "gpt_neox sequential"])
@pytest.mark.parametrize("settings", [{"schedule": [0.25, 0.5, 0.75]}, {"hidden_size": 9, "head": True}])
def test_counts_are_those_of_a_model_built(variant, settings):
    config, slicing = tiny_config(variant, SQUARE, tied=True), SlicingConfig(**settings)
    built = new_model(sliced_config(config, slicing))
    assert sliced_parameters(config, slicing) == sum(parameter.numel() for parameter in built.parameters())
    inside = sum(parameter.numel() for name, parameter in built.named_parameters() if "layers" in name)
    assert prunable_parameters(built.config) == inside
    assert all(parameter.isfinite().all() for parameter in built.parameters())


def test_a_quarter_sliced_is_not_a_quarter_fewer():
    """Residual matrices count: of Llama-2-7B sliced by 25 %, 84 % of the parameters are left."""
    dense, left = count_parameters(LLAMA_2_7B), sliced_parameters(LLAMA_2_7B, SlicingConfig(fraction=0.25))
    assert dense == 6738415616
    assert 0.83 < left / dense < 0.85


@pytest.mark.parametrize("rotation", ["per_signal", "shared"])
def test_the_fraction_for_a_number_of_parameters(rotation):
    slicing = SlicingConfig(rotation=rotation, head=True)
    budget = int(0.7 * count_parameters(LLAMA_2_7B))
    fraction = fraction_for(LLAMA_2_7B, slicing, budget)
    less = 8 if rotation == "per_signal" else 32
    found = sliced_parameters(LLAMA_2_7B, slicing.model_copy(update={"fraction": fraction}))
    above = sliced_parameters(LLAMA_2_7B, slicing.model_copy(update={"fraction": fraction - less / 4096}))
    assert found <= budget < above
    with pytest.raises(ValueError, match="no fraction"):
        fraction_for(LLAMA_2_7B, slicing, 1000)


@pytest.mark.parametrize(
    ("variant", "shape", "settings", "words"),
    [
        ("gemma2", MULTI_HEAD, {}, "of the family gemma2, whose attention and MLP end in a norm"),
        ("olmo2", MULTI_HEAD, {}, "cannot be rotated"),
        ("llama", GROUPED, {"fraction": 0.2, "hidden_size": 8}, "fraction and hidden_size; allowed: one"),
        ("llama", GROUPED, {"schedule": [0.2]}, "1 entries for 3 layers"),
        ("llama", GROUPED, {"schedule": [0.2, 1.0, 0.1]}, "less than 1"),
        ("llama", GROUPED, {"hidden_size": 25}, "slicing.hidden_size=24 or less"),
        ("llama", GROUPED, {"fraction": 0.9}, "slicing.fraction keeps no dimension"),
        ("llama", GROUPED, {"schedule": [0.9, 0.1, 0.1]}, "slicing.schedule keeps no dimension"),
        ("opt", SQUARE, {"rotation": "shared"}, "OPTForCausalLM the head size is the hidden size over the heads"),
        ("phi3 long", SQUARE, {"rotation": "shared"}, "slicing.rotation=per_signal"),
        ("llama", GROUPED, {"rotation": "shared", "hidden_size": 16}, "not a multiple of num_heads = 6"),
        ("llama", MULTI_HEAD, {"rotation": "shared", "schedule": [0.1] * 3}, "slicing.schedule=null"),
        ("phi", MULTI_HEAD, {"rotation": "shared", "hidden_size": 1}, "slicing.hidden_size=2 or more"),
        ("qwen2", MULTI_HEAD, {"rotation": "shared", "fraction": 0.8}, "slicing.fraction keeps no dimension"),
    ],
)
def test_what_is_refused_says_why_and_what_to_change(variant, shape, settings, words):
    (problem,) = check_slicing(tiny_config(variant, shape), SlicingConfig(**settings))
    assert words in problem


@pytest.mark.parametrize(
    "changes",
    [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}, {"_remove_final_layer_norm": True}],
)
def test_variants_of_opt_that_norm_elsewhere_are_refused(changes):
    (problem,) = check_slicing(tiny_config("opt", SQUARE) | changes, SlicingConfig())
    assert "a variant of opt" in problem


def test_a_sliced_model_is_not_sliced_again():
    config = tiny_config("llama", GROUPED)
    (problem,) = check_slicing(sliced_config(config, SlicingConfig(hidden_size=8)), SlicingConfig())
    assert "sliced already" in problem


def test_a_shared_size_that_the_family_can_hold():
    """Llama's config refuses a hidden size that is no multiple of the heads: a fraction is rounded down to one."""
    config = tiny_config("llama", GROUPED.model_copy(update={"hidden_size": 96}))
    slicing = SlicingConfig(rotation="shared", fraction=0.3)
    assert check_slicing(config, slicing) == []
    assert sliced_config(config, slicing)["hidden_size"] == 48
