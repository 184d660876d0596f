"""A sliced model under fine-tuning: adapters, gradient checkpointing, dropout, other types."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import TOKENS, shapes_of, tiny_config

from shearing.models.loading import load_model, model_tensors, new_model, read_config, write_model_directory
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import sliced_config

VARIANTS = ["llama", "qwen3", "phi", "phi3", "gpt_neox", "gpt_neox sequential", "opt"]
DROPOUT = {"phi": "resid_pdrop", "phi3": "resid_pdrop", "gpt_neox": "hidden_dropout", "opt": "dropout"}


def fresh(variant, changes=None):
    """A sliced model with weights large enough for every part to matter."""
    config = tiny_config(variant, shapes_of(variant)[-1]) | (changes or {})
    model = new_model(sliced_config(config, SlicingConfig(hidden_size=16)), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(variant):
    """Catches a layer that checkpointing passes by, or that hides a parameter from it."""
    model = fresh(variant).train()
    calls = []
    for layer in model.get_submodule(model.config.sliced["names"]["layers"]):
        norm = layer.get_submodule(model.config.sliced["names"]["attention_norm"])
        norm.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(model)
    once = len(calls)
    model.activation_checkpointing_enable()
    found = gradients(model)
    assert len(calls) == 3 * once  # forward, and forward again in the backward pass
    assert set(found) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_attach_train_and_merge(variant, tmp_path):
    """Catches linear layers that do not say their sizes, and a merge that gives another model."""
    base = fresh(variant)
    description = base.config.sliced
    targets = sorted({name.rsplit(".", 1)[-1] for name in (*description["layers"][0]["readers"], "up_proj", "dense")})
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=TOKENS, use_cache=False).logits
        again = PeftModel.from_pretrained(fresh(variant), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=TOKENS, use_cache=False).logits, trained)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS, use_cache=False).logits, trained, rtol=1e-4, atol=1e-4)
    write_model_directory(tmp_path / "merged", merged.config.to_dict(), model_tensors(merged))
    with torch.no_grad():
        reloaded = load_model(tmp_path / "merged")(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(reloaded, merged(input_ids=TOKENS, use_cache=False).logits.detach())


@pytest.mark.parametrize("variant", DROPOUT)
def test_dropout_is_the_stock_layer_s(variant):
    """Catches a rate in the config that nobody applies any more, and one that evaluation applies."""
    model = fresh(variant, {DROPOUT[variant]: 0.5})
    layer = model.get_submodule(model.config.sliced["names"]["layers"])[0]
    x = torch.ones(1, 50, 16)
    for half, sliced_part in enumerate((lambda: layer._dropped(0, x), lambda: layer._dropped(1, x))):
        model.train()
        assert 0.2 < float((sliced_part() == 0).float().mean()) < 0.8, half
        model.eval()
        assert torch.equal(sliced_part(), x)


def test_bfloat16_keeps_its_type_and_norms_are_wide(tmp_path):
    """Catches statistics of a norm in the weights' own type, and a residual matrix in another."""
    model = fresh("llama")
    write_model_directory(tmp_path / "model", model.config.to_dict(), model_tensors(model))
    loaded = load_model(tmp_path / "model", torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    norm = loaded.model.norm
    large = torch.full((1, 16), 3.0, dtype=torch.bfloat16) * 2**60
    expected = (large.double() * (large.double().pow(2).sum() / norm.size + norm.epsilon).rsqrt()).bfloat16()
    assert torch.equal(norm(large), expected)
    assert loaded(input_ids=TOKENS).logits.dtype == torch.bfloat16
    assert (norm.size, norm.epsilon) == (24, loaded.config.rms_norm_eps)


def test_layers_keep_the_name_by_which_placement_knows_them():
    model = fresh("llama")
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)


def test_our_own_copy_loads_it_without_trust(tmp_path):
    """Catches a directory that runs the code beside its weights though nobody said so."""
    model = fresh("opt")
    write_model_directory(tmp_path / "model", model.config.to_dict(), model_tensors(model))
    file = tmp_path / "model" / "modeling_sliced.py"
    file.write_text("raise RuntimeError('run without trust')\n")
    load_model(tmp_path / "model", trust_remote_code=True)
    assert read_config(tmp_path / "model")["auto_map"]["AutoModelForCausalLM"] == "modeling_sliced.SlicedOPTForCausalLM"
