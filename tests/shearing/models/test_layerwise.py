"""Parts of a model, read one at a time, against the whole model that Hugging Face loads."""

import pytest
import torch
from tiny_models import GROUPED, MULTI_HEAD, TOKENS, VARIANTS, shapes_of, tiny_model

from shearing.errors import UserError
from shearing.models.layerwise import LayerwiseModel
from shearing.models.loading import load_model, model_tensors, read_config, write_json, write_model_directory

PADDED = torch.ones_like(TOKENS)
PADDED[1, 7:] = 0


def saved(folder, variant, shape, tied=False, **options):
    model = tiny_model(variant, shape, tied)
    write_model_directory(folder, model.config.to_dict(), model_tensors(model), **options)
    return folder


def walked(parts, mask=None):
    """Logits and every layer's output, by one layer after another."""
    hidden = parts.embedding()(TOKENS, mask)
    options = parts.layer_options(hidden, mask)
    outputs = [hidden]
    with torch.no_grad():
        for index in range(parts.num_layers):
            outputs.append(parts.layer(index)(outputs[-1], **options[index]))
    return parts.tail()(outputs[-1]), outputs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_layers_one_after_another_are_the_model(variant, tied, tmp_path):
    """Catches a position, scale, window mask, rotary embedding or soft cap that the parts alone do not have."""
    for number, shape in enumerate(shapes_of(variant)):
        folder = saved(tmp_path / str(number), variant, shape, tied, max_shard_bytes=5_000)
        assert len(list(folder.glob("*.safetensors"))) > 1
        with torch.no_grad():
            whole = load_model(folder)(input_ids=TOKENS, output_hidden_states=True, use_cache=False)
        logits, outputs = walked(LayerwiseModel(folder))
        assert torch.equal(logits, whole.logits)
        for found, expected in zip(outputs[:-1], whole.hidden_states[:-1], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_reaches_every_layer(variant, tmp_path):
    """Catches a mask that is lost on the way: padding would then speak to tokens on its right."""
    shape = shapes_of(variant)[-1]
    folder = saved(tmp_path / "model", variant, shape)
    for mask in (PADDED, PADDED.flip(1)):  # to the right, and to the left
        with torch.no_grad():
            expected = load_model(folder)(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
        logits, _ = walked(LayerwiseModel(folder), mask)
        assert torch.equal(logits[mask == 1], expected[mask == 1])


def test_parts_come_in_the_type_asked_for_and_frequencies_in_their_own(tmp_path):
    """Catches rotary frequencies rounded with the weights."""
    folder = saved(tmp_path / "model", "gemma3_text", MULTI_HEAD)
    with torch.no_grad():
        expected = load_model(folder, torch.bfloat16)(input_ids=TOKENS, use_cache=False).logits
    parts = LayerwiseModel(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in parts.layer(0).parameters()} == {torch.bfloat16}
    assert torch.equal(walked(parts)[0], expected)


def test_options_do_not_depend_on_the_width_of_hidden_states(tmp_path):
    """Sliced hidden states are narrower than the model's own, and the masks are the same."""
    parts = LayerwiseModel(saved(tmp_path / "model", "opt", shapes_of("opt")[0]))
    wide = parts.layer_options(torch.zeros(2, 12, 32), PADDED)
    narrow = parts.layer_options(torch.zeros(2, 12, 8), PADDED)
    assert torch.equal(wide[1]["attention_mask"], narrow[1]["attention_mask"])


def test_only_what_is_asked_for_has_weights(tmp_path):
    """Catches a model that is loaded whole behind the scenes."""
    parts = LayerwiseModel(saved(tmp_path / "model", "llama", GROUPED))
    held = [parameter for parameter in parts._whole.parameters() if not parameter.is_meta]
    assert held == []
    parts.embedding()(TOKENS)
    parts.layer(1)
    assert all(parameter.is_meta for parameter in parts._whole.parameters())


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    folder = saved(tmp_path / "model", "llama", MULTI_HEAD)
    write_json(folder / "config.json", read_config(folder) | {"intermediate_size": 16})
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight has shape .* promises"):
        LayerwiseModel(folder).layer(0)
