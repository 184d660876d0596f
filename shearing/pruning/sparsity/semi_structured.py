"""Inference by torch's kernels for 2:4 sparse matrices, where the device has them.

Of every four weights the two that stay are kept, and where they were: on NVIDIA devices of compute capability 8.0 or
newer, in 16 bits. Shape suffixes: O, I output and input size of a linear layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

from shearing.errors import UserError
from shearing.models.family import family_of
from shearing.pruning.sparsity.sparsegpt import TWO_OF_FOUR

CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)


def use_semi_structured(model: Any) -> list[str]:
    """Puts sparse matrices in the place of a loaded model's dense ones, for inference only; nothing if it raises.

    Args:
        model: A causal language model, whose decoder layers' linear layers are all 2:4 sparse.

    Returns:
        Names of the linear layers that are sparse now; the others keep their dense matrix, their sizes being no
        multiples of what the kernels take.

    Raises:
        UserError: The device has no such kernels, the weights have another type, a matrix is not 2:4 sparse, or none
            has sizes that the kernels take.
    """
    problems = device_problems(model.device, model.dtype)
    linears = {
        name: module
        for name, module in model.get_submodule(family_of(model.config).layers).named_modules()
        if isinstance(module, nn.Linear)
    }
    dense = [name for name, module in linears.items() if not is_two_of_four(module.weight)]
    if dense:
        problems.append(
            f"{len(dense)} of {len(linears)} linear layers are not 2:4 sparse, {dense[0]} for one; make the "
            "model sparse with sparsifying.pattern=2:4 first"
        )
    fitting = {name: module for name, module in linears.items() if fits_kernel(module.weight)}
    if not fitting:
        problems.append(f"no linear layer has sizes that are multiples of {_multiples()}, which the kernels need")
    if problems:
        raise UserError(problems)
    for module in fitting.values():
        module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
    return list(fitting)


def device_problems(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why a device has no kernels for 2:4 sparse matrices of a type, one message a problem; an empty list if it has."""
    problems = []
    newest = f"NVIDIA devices of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if device.type != "cuda":
        problems.append(
            f"the model is on {device.type}, which has no kernels for 2:4 sparse matrices: only {newest} have. "
            "There zeros are multiplied like other weights; move it to such a device, or run it as it is"
        )
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        problems.append(f"the device has compute capability {found}; kernels for 2:4 sparse matrices: {newest}")
    if dtype not in DTYPES:
        problems.append(f"the weights are {dtype}; kernels for 2:4 sparse matrices take float16 and bfloat16")
    return problems


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Whether no group of four neighbours in a row keeps more than two, and every row ends with a whole group."""
    if weight_OI.shape[1] % TWO_OF_FOUR.group:
        return False
    kept = (weight_OI != 0).unflatten(1, (-1, TWO_OF_FOUR.group)).sum(-1)
    return int(kept.max()) <= TWO_OF_FOUR.group - TWO_OF_FOUR.dropped


def fits_kernel(weight_OI: Tensor) -> bool:
    """Whether the kernels take a matrix of these sizes."""
    return all(size % multiple == 0 for size, multiple in zip(weight_OI.shape, _multiples(), strict=True))


def _multiples() -> tuple[int, int]:
    # those of CUTLASS, the stricter of torch's two backends; which one it takes depends on how it was built
    least = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
    return least.sparse_min_rows, least.sparse_min_cols
