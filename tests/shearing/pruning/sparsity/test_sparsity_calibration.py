"""What goes into every linear layer, against hooks on the whole model that Hugging Face runs."""

import pytest
import torch
from tiny_models import GROUPED, TOKENS, VARIANTS, shapes_of, tiny_model
from torch import nn

from shearing.models.family import family_of
from shearing.models.loading import load_model, model_tensors, write_model_directory
from shearing.pruning.sparsity.calibration import CalibrationShare, add_hessians, text_digest

PADDED = torch.ones_like(TOKENS)
PADDED[1, 7:] = 0
MORE = (TOKENS * 5 + 3) % 61


def saved(folder, variant="llama", shape=GROUPED):
    model = tiny_model(variant, shape)
    write_model_directory(folder, model.config.to_dict(), model_tensors(model))
    return folder


@torch.no_grad()
def inputs_of(model, tokens, mask, layer):
    """What goes into each linear layer of one decoder layer of the whole model, without padding."""
    seen, handles = {}, []
    module = model.get_submodule(f"{family_of(model.config).layers}.{layer}")
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            handles.append(part.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]})))
    model(input_ids=tokens, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    kept = slice(None) if mask is None else mask.flatten() == 1
    return {name: x.reshape(-1, x.shape[-1])[kept].double() for name, x in seen.items()}


def close(found, inputs):
    by_name = {name: hessian for names, hessian in found.items() for name in names}
    assert by_name.keys() == inputs.keys()
    for name, x_SI in inputs.items():
        torch.testing.assert_close(by_name[name], 2 * x_SI.T @ x_SI, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_are_of_what_the_whole_model_reads(variant, tmp_path):
    """Linear layers left out, inputs of the dense model behind a sparse layer, padding counted, batches lost."""
    folder = saved(tmp_path / "model", variant, shapes_of(variant)[-1])
    whole = load_model(folder)
    for mask, size in ((None, 1), (PADDED, 2)):
        share = CalibrationShare(folder, TOKENS, mask, batch_sequences=size)
        share.embed()
        close(share.hessians(0), inputs_of(whole, TOKENS, mask, 0))
        linears = {
            name: part
            for name, part in whole.get_submodule(f"{family_of(whole.config).layers}.0").named_modules()
            if isinstance(part, nn.Linear)
        }
        dense = {name: part.weight.detach().clone() for name, part in linears.items()}
        sparse = {name: weight.masked_fill(weight.abs() < 0.1, 0) for name, weight in dense.items()}
        share.follow(0, sparse)
        for name, part in linears.items():
            part.weight.data.copy_(sparse[name])
        close(share.hessians(1), inputs_of(whole, TOKENS, mask, 1))
        for name, part in linears.items():
            part.weight.data.copy_(dense[name])


def test_readers_of_one_input_share_its_sum(tmp_path):
    """Three times the time and memory for queries, keys and values."""
    share = CalibrationShare(saved(tmp_path / "model"), TOKENS)
    share.embed()
    assert set(share.hessians(0)) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }
    assert all(total.dtype == torch.float64 for total in share.hessians(0).values())


def test_products_of_bfloat16_are_summed_in_float32(tmp_path):
    """Sums that keep eight bits, which leave SparseGPT a matrix without an inverse."""
    share = CalibrationShare(saved(tmp_path / "model"), TOKENS, dtype=torch.bfloat16)
    share.embed()
    for total_II in share.hessians(0).values():
        assert not torch.equal(total_II, total_II.bfloat16().double())


def test_shares_add_up(tmp_path):
    """A result that depends on the number of workers."""
    folder = saved(tmp_path / "model")
    whole = CalibrationShare(folder, torch.cat([TOKENS, MORE]))
    parts = [CalibrationShare(folder, tokens) for tokens in (TOKENS, MORE)]
    for share in (whole, *parts):
        share.embed()
        share.follow(0, {})
    found, expected = add_hessians([part.hessians(1) for part in parts]), whole.hessians(1)
    for names, total in expected.items():
        torch.testing.assert_close(found[names], total, rtol=1e-4, atol=1e-4)


def test_the_name_of_a_text_knows_its_tokens_and_its_padding():
    """Layers of another calibration taken for finished ones."""
    assert len({text_digest(TOKENS), text_digest(MORE), text_digest(TOKENS, PADDED)}) == 3
    assert text_digest(TOKENS.int()) == text_digest(TOKENS)
