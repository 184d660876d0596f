"""Sparse kernels: what is refused and why. That they compute is for a device that has them."""

import pytest
import torch
from tiny_models import MULTI_HEAD, TOKENS, tiny_model
from torch.sparse import SparseSemiStructuredTensor

from shearing.errors import UserError
from shearing.models.loading import new_model
from shearing.pruning.sparsity.semi_structured import (
    device_problems,
    fits_kernel,
    is_two_of_four,
    use_semi_structured,
)
from shearing.pruning.sparsity.sparsegpt import TWO_OF_FOUR, magnitude


def test_a_cpu_has_no_kernels_and_all_problems_are_named():
    """A stack out of torch's dispatcher; or a model that silently runs its dense path and is called sparse."""
    model = tiny_model("llama", MULTI_HEAD)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UserError) as error:
        use_semi_structured(model)
    device, dtype, dense, sizes = error.value.problems
    assert "the model is on cpu, which has no kernels for 2:4 sparse matrices" in device
    assert "torch.float32" in dtype
    assert "21 of 21 linear layers are not 2:4 sparse" in dense
    assert "multiples of (32, 64)" in sizes
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_device_type_and_capability_are_read(monkeypatch):
    """Kernels looked for on a device that is too old, or refused on one that is not."""
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (problem,) = device_problems(cuda, torch.float16)
    assert (
        "compute capability 7.5; kernels for 2:4 sparse matrices: NVIDIA devices of compute capability 8.0" in problem
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device_problems(cuda, torch.bfloat16) == device_problems(cuda, torch.float16) == []
    (problem,) = device_problems(cuda, torch.float32)
    assert "take float16 and bfloat16" in problem


@pytest.mark.parametrize(("shape", "fits"), [((32, 64), True), ((96, 192), True), ((48, 64), False), ((32, 96), False)])
def test_sizes_are_those_that_torch_takes(shape, fits):
    """A matrix that torch refuses in the middle of a model that is half converted."""
    assert fits_kernel(torch.zeros(shape)) == fits


def test_patterns_are_recognised():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    assert not is_two_of_four(weight)
    assert is_two_of_four(magnitude(weight, TWO_OF_FOUR))
    assert not is_two_of_four(magnitude(weight, 0.5)), "half of the weights, but not two of every four"
    assert not is_two_of_four(magnitude(weight[:, :14], TWO_OF_FOUR)), "a rest of two that no kernel takes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sparse_kernels_give_the_dense_answer():
    """Untested where there is no such device."""
    shape = MULTI_HEAD.model_copy(update={"hidden_size": 64, "head_size": 16, "intermediate_size": 128})
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": shape.num_heads, "head_dim": 16, "vocab_size": 61}
    model = new_model(config, dtype=torch.float16).cuda()
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    for linear in linears:
        linear.weight.data = magnitude(linear.weight.data, TWO_OF_FOUR)
    with torch.no_grad():
        dense = model(TOKENS.cuda()).logits
        assert len(use_semi_structured(model)) == len(linears)
        assert all(isinstance(linear.weight.data, SparseSemiStructuredTensor) for linear in linears)
        torch.testing.assert_close(model(TOKENS.cuda()).logits, dense, rtol=1e-2, atol=1e-2)
