import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import GROUPED, MULTI_HEAD, SQUARE, VARIANTS, shapes_of, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from shearing.errors import UserError
from shearing.models.families import FAMILIES
from shearing.models.family import (
    check_config,
    check_shape,
    family_of,
    is_tied,
    llama_config,
    memory_name,
    resized_config,
    shape_of,
    stored_name,
    vocabulary_of,
)
from shearing.models.loading import new_model
from shearing.models.parameters import count_parameters, parameter_sizes, prunable_parameters
from shearing.models.shape import Shape

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("model_type", FAMILIES)
class TestFamily:
    def test_left_out_keys_mean_what_the_config_class_takes(self, model_type):
        """Catches a default that differs from Hugging Face's: a config.json may leave any key out."""
        stock = AutoConfig.for_model(model_type)
        bare = {"model_type": model_type}
        assert shape_of(bare) == shape_of(stock)
        assert (vocabulary_of(bare), is_tied(bare)) == (stock.vocab_size, stock.tie_word_embeddings)
        assert check_config(bare) == check_config(stock) == []
        assert parameter_sizes(bare) == parameter_sizes(stock)

    def test_a_variant_of_it_is_in_the_contract(self, model_type):
        assert any(tiny_config(variant, SQUARE)["model_type"] == model_type for variant in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariant:
    @pytest.mark.parametrize("tied", [False, True])
    def test_names_and_sizes_are_those_of_the_model(self, variant, tied):
        """Catches a misspelt name, and a bias, a norm or a tied table counted wrongly."""
        for shape in shapes_of(variant):
            config = tiny_config(variant, shape, tied)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            family = family_of(config)
            assert shape_of(model.config) == shape_of(config) == shape
            assert type(model).__name__ == family.architecture
            assert model.get_submodule(family.embedding) is model.get_input_embeddings()
            assert model.get_submodule(family.lm_head) is model.get_output_embeddings()
            model.tie_weights()
            found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            assert parameter_sizes(config) == parameter_sizes(model.config) == found
            assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
            layers = model.get_submodule(family.layers)
            linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
            weights = sum(parameter.numel() for module in linears for parameter in module.parameters())
            assert prunable_parameters(config) == weights

    def test_resized_config_keeps_all_else(self, variant):
        source = shapes_of(variant)[-1]
        config = tiny_config(variant, source, tied=True)
        change = {"num_layers": 1, "intermediate_size": 7} | ({} if source == SQUARE else {"hidden_size": 12})
        other = source.model_copy(update=change)
        resized = resized_config(config, other, [1])
        assert shape_of(resized) == other
        assert count_parameters(config, other) == count_parameters(resized)
        assert prunable_parameters(config, other) == prunable_parameters(resized)
        changed = {key for key in config if resized[key] != config[key]}
        assert changed <= {"num_hidden_layers", "hidden_size", "intermediate_size", "ffn_dim", "max_window_layers"}


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_layers_with_a_window_keep_it(variant):
    """Catches layers that change their attention because the layers before them went."""
    source = AutoConfig.for_model(**tiny_config(variant, MULTI_HEAD))
    assert len(set(source.layer_types)) == 2
    for kept in ([0, 1], [0, 2], [1, 2]):
        small = MULTI_HEAD.model_copy(update={"num_layers": 2})
        for config in (source.to_dict(), tiny_config(variant, MULTI_HEAD)):  # types listed, types by a rule
            resized = AutoConfig.for_model(**resized_config(config, small, kept))
            assert resized.layer_types == [source.layer_types[layer] for layer in kept]


@pytest.mark.parametrize("parallel", [True, False])
def test_names_in_files_are_those_of_stock_transformers(parallel, tmp_path):
    """Catches a head that other tools and earlier releases would draw at random: `lm_head` for `embed_out`."""
    model = tiny_model("gpt_neox" if parallel else "gpt_neox sequential", SQUARE)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    ours = {name for name, _ in model.named_parameters()}
    assert "embed_out.weight" in names
    assert {stored_name(model.config, name) for name in ours} == names
    assert {memory_name(model.config, name) for name in names} == ours
    assert {memory_name(model.config, name) for name in ours} == ours


def test_variants_that_cannot_be_pruned_are_named():
    """Catches a model whose norms or projections lie where no gate knows them, found out only after training."""
    config = tiny_config("opt", SQUARE) | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    found = check_config(config)
    assert len(found) == 2
    assert "word_embed_proj_dim = 16" in found[0]
    assert "allowed: 32" in found[0]
    assert "do_layer_norm_before = False, a variant of opt" in found[1]
    assert check_config(config | {"do_layer_norm_before": True, "word_embed_proj_dim": 32}) == []
    resized = resized_config(config, SQUARE.model_copy(update={"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2}))
    assert resized["word_embed_proj_dim"] == 16


def test_published_sizes():
    """Llama-2-7B and the shapes of the paper's table: 6.74 B, 1.35 B and 2.70 B parameters."""
    assert count_parameters(LLAMA_2_7B) == 6738415616
    small = Shape(num_layers=24, hidden_size=2048, num_heads=16, num_kv_heads=16, head_size=128, intermediate_size=5504)
    middle = Shape(
        num_layers=32, hidden_size=2560, num_heads=20, num_kv_heads=20, head_size=128, intermediate_size=6912
    )
    assert count_parameters(LLAMA_2_7B, small) == 1345423360
    assert count_parameters(LLAMA_2_7B, middle) == 2701560320


def test_unknown_family_says_what_is_known():
    with pytest.raises(UserError) as caught:
        family_of({"model_type": "mamba"})
    (problem,) = caught.value.problems
    assert "mamba" in problem
    assert "llama, mistral, qwen2, qwen3" in problem
    assert "shearing/models/families.py" in problem
    assert (Path(__file__).parents[3] / "docs" / "ADDING_A_FAMILY.md").is_file()
    assert "docs/ADDING_A_FAMILY.md" in problem


def test_shapes_that_no_model_can_have():
    """Catches a shape that fails only when the model is built, or one refused that Hugging Face takes."""
    path = "source.train.shape"
    assert check_shape(FAMILIES["llama"], GROUPED, path) == []
    wrong = Shape(num_layers=1, hidden_size=22, num_heads=4, num_kv_heads=3, head_size=7, intermediate_size=5)
    found = check_shape(FAMILIES["llama"], wrong, path)
    assert [problem.split(" = ")[0] for problem in found] == [
        "source.train.shape.num_heads",
        "source.train.shape.head_size",
        "source.train.shape.hidden_size",
    ]
    assert len(check_shape(FAMILIES["qwen2"], wrong, path)) == 2
    for problem in found:
        key, value = problem.rsplit("Set source.train.shape.", 1)[1].rstrip(".").split("=")
        wrong = wrong.model_copy(update={key: int(value)})
    assert check_shape(FAMILIES["llama"], wrong, path) == []
    new_model(llama_config(wrong, 10, 16))


def test_loads_without_torch():
    """Catches an import that would make the preflight slow."""
    code = (
        "import sys, shearing.models.families, shearing.models.parameters, shearing.pruning.target;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
