"""Norms under gates: statistics over the dimensions that stay, weights times gates, for every kind of norm there is.

Shape suffix D: the dimensions that a norm is over. Each forward keeps the order of casts that Hugging Face's own has,
so that open gates change nothing; a type wider than float32 stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from shearing.models.families import NormKind


@dataclass(frozen=True)
class Kept:
    """Which dimensions a norm's statistics are over.

    Attributes:
        count: How many.
        open_D: True for each of them; None where all are kept.
    """

    count: int
    open_D: Tensor | None


def gated_vector(vector: Tensor, gates: Tensor | None) -> Tensor:
    """A vector times its gates, rounded once to its own type."""
    return vector if gates is None else (vector * gates).to(vector.dtype)


def gated_norm_weight(kind: NormKind, weight_D: Tensor, gates_D: Tensor | None) -> Tensor:
    """The weight of a norm whose output is multiplied by gates, rounded once to its own type."""
    if kind == "rms_plus_one" and gates_D is not None:
        # (1 + w) z - 1, written so that a gate of 1 leaves every bit of w
        return (weight_D * gates_D + (gates_D - 1)).to(weight_D.dtype)
    return gated_vector(weight_D, gates_D)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled_to_one(wide: Tensor, epsilon: float, kept: Kept) -> Tensor:
    # Closed dimensions are zero in what a norm reads, so the sum over all is the sum over the kept ones.
    variance = wide.pow(2).sum(-1, keepdim=True) / kept.count
    return wide * torch.rsqrt(variance + epsilon)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _rms(module: nn.Module, epsilon: float, gates_D: Tensor | None, kept: Kept, x: Tensor) -> Tensor:
    normed = _scaled_to_one(_wide(x), epsilon, kept).to(x.dtype)
    return gated_vector(_weight(module), gates_D) * normed


def _rms_wide(module: nn.Module, epsilon: float, gates_D: Tensor | None, kept: Kept, x: Tensor) -> Tensor:
    normed = _scaled_to_one(_wide(x), epsilon, kept)
    return (gated_vector(_weight(module), gates_D) * normed).to(x.dtype)


def _rms_plus_one(module: nn.Module, epsilon: float, gates_D: Tensor | None, kept: Kept, x: Tensor) -> Tensor:
    normed = _scaled_to_one(_wide(x), epsilon, kept)
    weight_D = gated_norm_weight("rms_plus_one", _weight(module), gates_D)
    return (normed * (1 + _wide(weight_D))).to(x.dtype)


def _layer(module: nn.Module, epsilon: float, gates_D: Tensor | None, kept: Kept, x: Tensor) -> Tensor:
    wide = _wide(x)
    centred = wide - wide.sum(-1, keepdim=True) / kept.count
    if kept.open_D is not None:
        centred = centred * kept.open_D
    normed = _scaled_to_one(centred, epsilon, kept)
    bias = module.bias
    assert isinstance(bias, Tensor)
    weight_D, bias_D = gated_vector(_weight(module), gates_D), gated_vector(bias, gates_D)
    return (normed * weight_D + bias_D).to(x.dtype)


GatedNorm = Callable[[nn.Module, float, Tensor | None, Kept, Tensor], Tensor]

GATED_NORMS: Mapping[NormKind, GatedNorm] = MappingProxyType(
    {"rms": _rms, "rms_wide": _rms_wide, "rms_plus_one": _rms_plus_one, "layer": _layer}
)


def gated_head_norm(kind: NormKind, module: nn.Module, epsilon: float, kept: Kept, x: Tensor) -> Tensor:
    """A norm over all heads together, of the heads that stay: the closed ones are taken out of what it reads."""
    assert kept.open_D is not None
    return GATED_NORMS[kind](module, epsilon, None, kept, x * kept.open_D)
