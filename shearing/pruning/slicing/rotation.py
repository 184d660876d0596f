"""Rotations from covariances, in float64. Shape suffixes: D hidden, K dimensions kept."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shearing.models.families import Family

DAMPING = 0.01  # of the mean of the diagonal


@dataclass(frozen=True)
class Rotation:
    """What a signal is multiplied by.

    Attributes:
        basis_DK: Orthonormal columns, float64.
        kept_variance: Share of the signal's sum of squares that lies within them.
    """

    basis_DK: Tensor
    kept_variance: float


def rotation_of(covariance_DD: Tensor, size: int, orientation: Literal["pca", "random"], seed: int) -> Rotation:
    """The rotation of a signal to the `size` directions that hold most of it.

    Args:
        covariance_DD: Sum of x x' over the tokens, float64.
        size: Directions kept.
        orientation: Eigenvectors by falling eigenvalue; or those turned by a random orthogonal matrix.
        seed: Of that matrix.

    Source: arXiv 2401.15024, section 3.3 and released code.
    """
    damped = covariance_DD.clone()
    damped.diagonal().add_(DAMPING * covariance_DD.diagonal().mean())
    basis_DK = torch.linalg.eigh(damped).eigenvectors.flip(-1)[:, :size].contiguous()  # eigenvalues come ascending
    kept = torch.einsum("dk,de,ek->", basis_DK, covariance_DD, basis_DK) / covariance_DD.trace()
    if orientation == "random":
        basis_DK = basis_DK @ random_orthogonal(size, seed)
    return Rotation(basis_DK, float(kept))


def random_orthogonal(size: int, seed: int) -> Tensor:
    """A matrix [size, size] drawn evenly from all orthogonal ones, float64."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def shared_rotation(
    family: Family, covariance_DD: Tensor, size: int, orientation: Literal["pca", "random"], seed: int
) -> Rotation:
    """The one rotation of all signals, for a plain model with `size` hidden dimensions.

    A plain LayerNorm subtracts the mean of the dimensions kept. Where the family has one, the signals are put into the
    space of all vectors with mean zero, which has one dimension less than there are; the fused signals have mean zero,
    so that nothing is lost at full size.

    Args:
        family: Of the model.
        covariance_DD: Sum over all signals, float64.
        size: Hidden dimensions of the result.
        orientation: As for `rotation_of`.
        seed: As for `rotation_of`.
    """
    if family.norm != "layer":
        return rotation_of(covariance_DD, size, orientation, seed)
    found = rotation_of(covariance_DD, size - 1, orientation, seed)
    # orthonormal rows without a mean: those of a QR decomposition whose first vector is the mean's
    start = torch.cat([torch.ones(size, 1, dtype=torch.float64), torch.eye(size, dtype=torch.float64)[:, 1:]], dim=1)
    without_mean_JK = torch.linalg.qr(start).Q[:, 1:].T
    return Rotation(found.basis_DK @ without_mean_JK, found.kept_variance)
