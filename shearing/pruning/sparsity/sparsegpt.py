"""Zeros in one matrix: which weights go, and by SparseGPT how those that stay make up for it.

Everything is worked out in float64: with a damping of 1 % of the mean diagonal the inverse of a Hessian can have a
condition number that leaves float32 few digits, and sums of errors over thousands of columns lose more of them.
Shape suffixes: O, I output and input size of a linear layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of the diagonal


class GroupPattern(NamedTuple):
    """So many of every `group` neighbours in a row go, as 2 of 4; of a shorter rest the same share, rounded down."""

    dropped: int
    group: int


Pattern = GroupPattern | float  # or a share of all weights, wherever they are
TWO_OF_FOUR = GroupPattern(2, 4)


def least(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Where a pattern drops the least scores, bool [O, I]; of equal scores the earlier one goes."""
    if isinstance(pattern, float):
        count = round(pattern * scores_OI.numel())
        order = scores_OI.flatten().argsort(stable=True)
        return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True).view_as(scores_OI)
    dropped = torch.zeros_like(scores_OI, dtype=torch.bool)
    whole = scores_OI.shape[1] // pattern.group * pattern.group
    for start, stop, size in ((0, whole, pattern.group), (whole, scores_OI.shape[1], scores_OI.shape[1] - whole)):
        if start < stop:
            groups = scores_OI[:, start:stop].unflatten(1, (-1, size))
            order = groups.argsort(dim=-1, stable=True)[..., : size * pattern.dropped // pattern.group]
            dropped[:, start:stop] = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)
    return dropped


def magnitude(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    """The matrix without its smallest weights."""
    return weight_OI.masked_fill(least(weight_OI.abs(), pattern), 0)


def at_random(weight_OI: Tensor, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """The matrix without weights drawn evenly."""
    scores_OI = torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
    return weight_OI.masked_fill(least(scores_OI, pattern), 0)


def sparsegpt(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern, *, block_columns: int = BLOCK_COLUMNS) -> Tensor:
    """The matrix with zeros where a pattern wants them and the other weights moved to make up for them.

    Column after column, from left to right: weights that go leave an error, which the columns to the right take over in
    the way that changes the output least, columns to the left being settled. Which go is decided as late as the pattern
    lets: for every group when its first column is reached, for a share when its block is, each block losing that share.
    Weights of a column whose input was zero throughout calibration are the first to go, and those that stay, stay as
    they were. Where all inputs were, the smallest go.

    Args:
        weight_OI: The weights; any type, and the result is of that type.
        hessian_II: Sum of 2 x x' over the inputs of calibration, undamped, on the same device; its scale does not
            matter.
        pattern: What goes.
        block_columns: Columns whose errors are kept back and spread at once; a multiple of the pattern's group.

    Raises:
        ValueError: The Hessian holds what is no number, or has no inverse.

    Source: arXiv 2301.00774, section 3 and algorithm 1.
    """
    assert not isinstance(pattern, GroupPattern) or block_columns % pattern.group == 0
    seen_I = hessian_II.diagonal() != 0
    if not bool(seen_I.any()):
        return magnitude(weight_OI, pattern)
    left_OI, factor_II = weight_OI.to(torch.float64, copy=True), _inverse_factor(hessian_II)
    columns = weight_OI.shape[1]
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        error_OB = _settle(left_OI[:, start:stop], factor_II[start:stop, start:stop], seen_I[start:stop], pattern)
        left_OI[:, stop:] -= error_OB @ factor_II[start:stop, stop:]
    return left_OI.to(weight_OI.dtype)


def _settle(block_OB: Tensor, factor_BB: Tensor, seen_B: Tensor, pattern: Pattern) -> Tensor:
    """Settles the columns of one block, in place. Returns what they leave to the columns after the block."""
    diagonal_B, error_OB = factor_BB.diagonal(), torch.zeros_like(block_OB)
    group = block_OB.shape[1] if isinstance(pattern, float) else pattern.group
    for column in range(block_OB.shape[1]):
        if column % group == 0:
            coming = slice(column, column + group)
            scores_OG = (block_OB[:, coming] / diagonal_B[coming]).square() * seen_B[coming]
            dropped_OG = least(scores_OG, pattern)
        settled_O = block_OB[:, column].masked_fill(dropped_OG[:, column % group], 0)
        error_OB[:, column] = (block_OB[:, column] - settled_O) / diagonal_B[column]
        block_OB[:, column:] -= error_OB[:, column, None] * factor_BB[column, column:]
        block_OB[:, column] = settled_O  # zeros are zeros
    return error_OB


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper triangular U with U'U the inverse of the damped Hessian, float64.

    U_jj squared is [H^-1]_jj of the columns from j on alone, and row j of U over U_jj the direction in which they make
    up for column j: what eliminating column after column from H^-1 would give.
    """
    damped_II = hessian_II.to(torch.float64, copy=True)
    if not bool(torch.isfinite(damped_II).all()):
        raise ValueError("the Hessian of a linear layer holds values that are no numbers: so do its inputs")
    damped_II.diagonal().add_(DAMPING * damped_II.diagonal().mean())
    try:
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
        return torch.linalg.cholesky(inverse_II, upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the Hessian of a linear layer has no inverse in float64 ({error}): calibrate on more sequences"
        ) from None


def relative_error(weight_OI: Tensor, sparse_OI: Tensor, hessian_II: Tensor) -> float:
    """Squared change of a linear layer's output over calibration, as a share of the output's own square."""
    hessian_II = hessian_II.double()
    size, change = (
        float(((matrix_OI @ hessian_II) * matrix_OI).sum())
        for matrix_OI in (weight_OI.double(), (sparse_OI.double() - weight_OI.double()))
    )
    return change / size if size else 0.0
