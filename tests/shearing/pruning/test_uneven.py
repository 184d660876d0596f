"""Uneven layers: masked, extracted and reloaded are one function for every family that can have them."""

import pytest
import torch
from masked_models import load_quietly, logits, relative_difference
from tiny_models import GROUPED, MULTI_HEAD, QUOTIENT, TOKENS, VARIANTS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from shearing.models.family import family_of, shape_of
from shearing.models.loading import load_model, model_tensors, new_model, read_config, write_model_directory
from shearing.models.parameters import count_parameters, prunable_parameters
from shearing.pruning.config import PruningConfig
from shearing.pruning.gates import gates_for
from shearing.pruning.masks import attach_gates
from shearing.pruning.uneven import extract_uneven

CAN = [variant for variant in VARIANTS if not variant.startswith(QUOTIENT)]


def overall_gates(config, sparsity=0.5, **changed):
    """Gates that have moved far from each other, which take attention out of layer 0 and the MLP out of layer 1."""
    pruning = PruningConfig(steps=1, global_batch_tokens=1, target={"sparsity": sparsity}, **changed)
    gates = gates_for(config, pruning, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(2 * torch.randn(log_alpha.shape, generator=generator))
        if not changed:
            gates.log_alpha["attention_layer"].copy_(torch.tensor([-40.0, 3.0, 3.0]))
            gates.log_alpha["mlp_layer"].copy_(torch.tensor([3.0, -40.0, 3.0]))
    return gates


def cut(model, z):
    config, tensors, kept = extract_uneven(model.config, family_of(model.config), dict(model_tensors(model)), z)
    return config, dict(tensors), kept


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", CAN)
def test_a_bound_on_all_parameters_holds_for_the_result(variant, tied):
    # catches embeddings that are left out or counted twice, positions, biases of norms, and a bound that is overstepped
    model = tiny_model(variant, MULTI_HEAD, tied)
    whole = count_parameters(model.config)
    asked = int(0.6 * whole)
    pruning = PruningConfig(steps=1, global_batch_tokens=1, target={"parameters": asked})
    gates = gates_for(model.config.to_dict(), pruning, seed=1)
    config, _, _ = cut(model, gates.deterministic(exact=True))
    assert asked * 0.97 < count_parameters(config) <= asked
    narrow = {"hidden": (torch.arange(MULTI_HEAD.hidden_size) < 17).double()}
    expected = count_parameters(model.config, MULTI_HEAD.model_copy(update={"hidden_size": 17}))
    assert int(gates.overall.count(narrow)) == expected
    assert int(gates.overall.count({})) == whole


@pytest.mark.parametrize("shape", [MULTI_HEAD, GROUPED], ids=["multi_head", "grouped"])
@pytest.mark.parametrize("variant", CAN)
class TestContract:
    def test_masked_is_extracted_is_reloaded(self, variant, shape, tmp_path, caplog):
        # catches gates folded into the wrong layer, half-layers that still add something, heads cut at even sizes, a
        # cache that counts from a layer without attention, and files that only our own loader reads
        model = tiny_model(variant, shape)
        gates = overall_gates(model.config.to_dict())
        z = gates.deterministic(exact=True)
        slots = attach_gates(model, family_of(model.config))
        slots.set(z)
        masked = logits(model)
        slots.set(None)
        config, tensors, kept = cut(model, z)
        write_model_directory(tmp_path / "model", config, tensors.items())
        assert relative_difference(logits(load_model(tmp_path / "model")), masked) < 1e-4
        stock = load_quietly(tmp_path / "model", caplog, trust_remote_code=True)
        assert relative_difference(logits(stock), masked) < 1e-4
        assert [layer["skip"] for layer in config["uneven"]["layers"][:2]] == [["attention"], ["mlp"]]
        left = {name: (gate > 0).double() for name, gate in z.items()}
        assert prunable_parameters(config) == int(gates.overall.count(left)) <= gates.overall.budget
        assert count_parameters(config) == sum(p.numel() for p in stock.parameters())
        assert len(kept["hidden"]) == stock.config.hidden_size
        self.check_generation(stock, model, slots, z)
        stock.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert torch.equal(logits(again.eval()), logits(stock))

    def check_generation(self, stock, model, slots, z):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        slots.set(z)
        expected = model.generate(TOKENS, use_cache=False, **options)
        slots.set(None)
        assert torch.equal(stock.generate(TOKENS, use_cache=True, **options), expected)


def test_a_model_with_fresh_weights_has_the_same_layers():
    # catches the comparison from nothing at the largest sizes
    model = tiny_model("llama", MULTI_HEAD)
    config, tensors, _ = cut(model, overall_gates(model.config.to_dict()).deterministic(exact=True))
    fresh = new_model(config, seed=4)
    assert {name: p.shape for name, p in fresh.named_parameters()} == {name: t.shape for name, t in tensors.items()}


def test_tied_embeddings_stay_tied(tmp_path):
    # catches hidden gates folded twice where the head is the embedding table
    model = tiny_model("qwen3", GROUPED, tied=True)
    z = overall_gates(model.config.to_dict()).deterministic(exact=True)
    slots = attach_gates(model, family_of(model.config))
    slots.set(z)
    masked = logits(model)
    slots.set(None)
    config, tensors, _ = cut(model, z)
    write_model_directory(tmp_path / "model", config, tensors.items())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert relative_difference(logits(found), masked) < 1e-4


def test_a_layer_that_loses_both_halves_goes_whole():
    # catches a hollow layer that costs norms and time for nothing
    model = tiny_model("qwen2", MULTI_HEAD)
    gates = overall_gates(model.config.to_dict(), 0.4, drop={"layers": [1]}, keep={"layers": [-1]})
    z = gates.deterministic(exact=True)
    config, _, kept = cut(model, z)
    assert 1 not in kept["layer"]
    assert 2 in kept["layer"]
    assert config["num_hidden_layers"] == len(kept["layer"]) == len(config["layer_types"])
    assert z["attention_layer"][2] == z["mlp_layer"][2] == 1
    assert shape_of(config).num_layers == len(config["uneven"]["layers"])


def test_stock_classes_alone_do_not_take_it_for_even(tmp_path):
    # catches a wrong model without a word, where nobody trusts the file beside it
    model = tiny_model("llama", MULTI_HEAD)
    config, tensors, _ = cut(model, overall_gates(model.config.to_dict()).deterministic(exact=True))
    write_model_directory(tmp_path / "model", config, tensors.items())
    assert (tmp_path / "model/modeling_uneven.py").exists()
    assert read_config(tmp_path / "model")["model_type"] == "llama"
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)


def test_even_config_counts_as_before():
    even = sum(parameter.numel() for parameter in tiny_model("llama", MULTI_HEAD).parameters())
    assert count_parameters(tiny_config("llama", MULTI_HEAD)) == even
