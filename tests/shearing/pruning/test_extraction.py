"""Extraction beyond the contract of the families: which units stay, what is refused, trained models."""

from pathlib import Path

import pytest
import torch
from masked_models import extracted, load_quietly, logits, random_gates, relative_difference
from tiny_models import FREE_TARGETS, targets_of, tiny_model

from shearing.models.family import family_of, shape_of
from shearing.models.loading import StoredTensors, load_model, model_tensors, read_config, write_model_directory
from shearing.pruning.extraction import extract, kept_units
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import target_shape

GOLDEN_MODELS = Path(__file__).parents[4] / "shared/golden/models"


class TestKeptUnits:
    def test_largest_stay_in_order(self):
        source, asked = FREE_TARGETS["queries"]
        small = target_shape(source, asked)
        z = random_gates(source, small)
        kept = kept_units(z, source, small)
        assert kept["layer"] == torch.nonzero(z["layer"]).flatten().tolist()
        assert kept["hidden"] == torch.nonzero(z["hidden"]).flatten().tolist()
        assert kept["head"] == [torch.nonzero(row).flatten().tolist() for row in z["head"]]
        assert [len(row) for row in kept["intermediate"]] == [13, 13, 13]

    def test_gates_that_are_not_at_the_target_are_refused(self):
        """Catches a right-shaped but wrong model out of gates that never closed."""
        source, asked = FREE_TARGETS["queries"]
        small = target_shape(source, asked)
        z = random_gates(source, small)
        z["hidden"] = torch.ones(source.hidden_size)
        with pytest.raises(ValueError, match="24 gates of 'hidden' are open in a row where the target has 16"):
            kept_units(z, source, small)

    def test_weights_unknown_to_the_family_are_refused(self):
        """Catches an extra weight (an adapter, another variant) that would be dropped without a word."""
        source, asked = FREE_TARGETS["heads"]
        model = tiny_model("qwen2", source)
        small = target_shape(source, asked)
        tensors = dict(model_tensors(model)) | {"model.layers.0.adapter.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"unknown \['model.layers.0.adapter.weight'\]"):
            extract(model.config, family_of(model.config), tensors, random_gates(source, small), small)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_windows_stay_with_their_layers(variant):
    """Catches a list of layer types cut at its end instead of at the layers that went."""
    source, asked = targets_of(variant)["layers_alone"]
    model = tiny_model(variant, source)
    types = model.config.layer_types
    assert len(set(types)) == 2
    for layer in range(source.num_layers):
        z = {"layer": torch.zeros(source.num_layers)}
        z["layer"][layer] = 1.0
        config, _ = extracted(model, z, target_shape(source, asked))
        assert config["layer_types"] == [types[layer]]


@pytest.mark.skipif(not GOLDEN_MODELS.is_dir(), reason="no golden models beside this checkout")
class TestTrainedModel:
    """Models trained on text, in the config format of an earlier transformers."""

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("llama_gqa", {"hidden_size": 96, "num_heads": 2, "num_kv_heads": 1}),
            ("opt", {"hidden_size": 96, "num_heads": 3, "num_kv_heads": 3}),
        ],
    )
    def test_masked_is_extracted_is_reloaded(self, name, change, tmp_path, caplog):
        folder = GOLDEN_MODELS / name
        model, config = load_model(folder), read_config(folder)
        source, family = shape_of(config), family_of(config)
        assert source == shape_of(model.config)
        target = source.model_copy(update={"num_layers": 3, "intermediate_size": 256} | change)
        z = random_gates(source, target)
        slots = attach_gates(model, family)
        slots.set(z)
        tokens = torch.randint(1000, (2, 100), generator=torch.Generator().manual_seed(1))
        masked = logits(model, tokens)
        new_config, tensors = extract(config, family, StoredTensors(folder), z, target)
        write_model_directory(
            tmp_path / "pruned", new_config, tensors, tokenizer_folder=folder, max_shard_bytes=200_000
        )
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 2
        assert len(StoredTensors(tmp_path / "pruned")) == len(dict(model_tensors(reloaded)))
        assert relative_difference(logits(reloaded, tokens), masked) < 1e-4
