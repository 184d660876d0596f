"""Training a sparse model without filling its zeros."""

from typing import Any

import torch
from torch import nn

from shearing.models.family import family_of


def keep_zeros(model: Any) -> None:
    """Let no gradient reach the weights that are 0 in the linear layers of the decoder layers.

    Without a gradient their moments stay 0, and so do AdamW's update and its decay. Which weights are 0 is read off
    the weights themselves at each backward pass: under ZeRO 3 they are whole just then, and no mask has to be held
    beside them.
    """
    for module in model.get_submodule(family_of(model.config).layers).modules():
        if isinstance(module, nn.Linear):
            _keep(module.weight)


def _keep(weight: torch.Tensor) -> None:
    def masked(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.masked_fill(weight == 0, 0)

    weight.register_hook(masked)
