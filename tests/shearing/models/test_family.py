import subprocess
import sys

import pytest
import torch
from tiny_models import GROUPED, MULTI_HEAD, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from shearing.errors import UserError
from shearing.models.family import (
    FAMILIES,
    check_shape,
    family_of,
    is_tied,
    llama_config,
    resized_config,
    shape_of,
    vocabulary_of,
)
from shearing.models.loading import new_model
from shearing.models.parameters import count_parameters, prunable_parameters
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

    @pytest.mark.parametrize("shape", [MULTI_HEAD, GROUPED])
    def test_names_are_those_of_the_model(self, model_type, shape):
        """Catches a misspelt module name, and a norm or projection that does not have the size its place has."""
        family, model = FAMILIES[model_type], tiny_model(model_type, shape)
        assert shape_of(model.config) == shape_of(tiny_config(model_type, shape)) == shape
        assert model.get_submodule(family.embedding) is model.get_input_embeddings()
        assert model.get_submodule(family.lm_head) is model.get_output_embeddings()
        assert len(model.get_submodule(family.layers)) == shape.num_layers
        assert type(model).__name__ == family.architecture
        queries, key_values = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        sizes = {
            family.query: (queries, shape.hidden_size),
            family.key: (key_values, shape.hidden_size),
            family.value: (key_values, shape.hidden_size),
            family.output: (shape.hidden_size, queries),
            family.gate: (shape.intermediate_size, shape.hidden_size),
            family.up: (shape.intermediate_size, shape.hidden_size),
            family.down: (shape.hidden_size, shape.intermediate_size),
            family.attention_norm: (shape.hidden_size,),
            family.mlp_norm: (shape.hidden_size,),
        }
        for name, size in sizes.items():
            module = model.get_submodule(family.layer_module(1, name))
            assert tuple(module.weight.shape) == size, name

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("shape", [MULTI_HEAD, GROUPED])
    def test_counts_equal_the_model(self, model_type, shape, tied):
        """Catches a bias, a norm or a tied table counted wrongly."""
        config = tiny_config(model_type, shape, tied)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
        assert count_parameters(model.config) == count_parameters(config)
        linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
        weights = sum(parameter.numel() for module in linears for parameter in module.parameters())
        assert prunable_parameters(config) == weights

    def test_counts_of_another_shape(self, model_type):
        config = tiny_config(model_type, GROUPED)
        other = GROUPED.model_copy(update={"num_layers": 2, "hidden_size": 12})
        resized = resized_config(config, other, [0, 2])
        assert count_parameters(config, other) == count_parameters(resized)
        assert prunable_parameters(config, other) == prunable_parameters(resized)

    def test_resized_config_keeps_all_else(self, model_type):
        config = tiny_config(model_type, GROUPED, tied=True)
        other = GROUPED.model_copy(update={"num_layers": 1, "hidden_size": 12})
        resized = resized_config(config, other, [1])
        assert shape_of(resized) == other
        assert resized["head_dim"] == 8
        changed = {key for key in config if resized[key] != config[key]}
        assert changed <= {"num_hidden_layers", "hidden_size", "max_window_layers"}

    def test_layers_with_a_window_keep_it(self, model_type):
        """Catches layers that change their attention because the layers before them went."""
        source = AutoConfig.for_model(**tiny_config(model_type, MULTI_HEAD))
        types = getattr(source, "layer_types", None)
        if types is None:
            pytest.skip("one kind of layers")
        for kept in ([0, 1], [0, 2], [1, 2]):
            small = MULTI_HEAD.model_copy(update={"num_layers": 2})
            for config in (source.to_dict(), tiny_config(model_type, MULTI_HEAD)):  # types listed, types by a number
                resized = AutoConfig.for_model(**resized_config(config, small, kept))
                assert resized.layer_types == [types[layer] for layer in kept]


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
    assert "shearing/models/family.py" in problem


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
        "import sys, shearing.models.family, shearing.models.parameters, shearing.pruning.target;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
