"""Models whose config says one thing and whose modules say another are refused before gates are attached."""

import pytest
import torch
from tiny_models import GROUPED, SQUARE, tiny_model

from shearing.errors import UserError
from shearing.models.families import FAMILIES
from shearing.models.recognition import check_model


class TestRecognition:
    def test_module_of_another_type(self):
        """Catches an adapter around a projection: its weights would be trained and then lost."""
        model = tiny_model("llama", GROUPED)
        mlp = model.model.layers[1].mlp
        mlp.down_proj = torch.nn.Sequential(mlp.down_proj)
        with pytest.raises(UserError, match=r"has a Sequential at model.layers.1.mlp.down_proj, where a Linear"):
            check_model(model, FAMILIES["llama"])

    def test_norm_of_another_kind(self):
        model = tiny_model("llama", GROUPED)
        model.model.norm = torch.nn.LayerNorm(GROUPED.hidden_size)
        with pytest.raises(UserError, match=r"has a LayerNorm at model\.norm, where a RMSNorm belongs"):
            check_model(model, FAMILIES["llama"])

    def test_module_that_is_missing(self):
        model = tiny_model("opt", SQUARE)
        del model.model.decoder.final_layer_norm
        with pytest.raises(UserError, match=r"has no module model\.decoder\.final_layer_norm"):
            check_model(model, FAMILIES["opt"])

    def test_weights_beside_those_of_the_family(self):
        model = tiny_model("qwen2", GROUPED)
        model.model.layers[0].mlp.adapter = torch.nn.Linear(3, 3)
        with pytest.raises(UserError, match=r"holds 2 weights .*'model\.layers\.0\.mlp\.adapter\.bias'"):
            check_model(model, FAMILIES["qwen2"])

    def test_variant_without_gated_form(self):
        model = tiny_model("opt", SQUARE)
        model.config.do_layer_norm_before = False
        with pytest.raises(UserError, match="do_layer_norm_before = False, a variant of opt"):
            check_model(model, FAMILIES["opt"])
