"""SparseGPT against elimination row by row with dense inverses, and what holds for every matrix."""

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shearing.pruning.sparsity.sparsegpt import (
    DAMPING,
    TWO_OF_FOUR,
    GroupPattern,
    at_random,
    least,
    magnitude,
    relative_error,
    sparsegpt,
)


def example(rows=6, columns=24, tokens=200, seed=1):
    """Weights, and inputs whose columns speak of each other."""
    generator = torch.Generator().manual_seed(seed)
    inputs_SI = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    mix_II = torch.eye(columns, dtype=torch.float64) + 0.4 * torch.randn(columns, columns, generator=generator).double()
    weight_OI = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight_OI, inputs_SI @ mix_II


def hessian_of(inputs_SI):
    return 2 * inputs_SI.T @ inputs_SI


def damped(hessian_II):
    return hessian_II + DAMPING * hessian_II.diagonal().mean() * torch.eye(len(hessian_II), dtype=torch.float64)


def by_elimination(weight_OI, hessian_II, pattern, block):
    """The same greedy rule in its plainest form: the inverse of what is left, taken anew for every column.

    Which weights of a share go is decided for all rows of a block together, so the rows run side by side.
    """
    left_OI, hessian_II = weight_OI.clone(), damped(hessian_II)
    columns = left_OI.shape[1]
    inverses = [torch.linalg.inv(hessian_II[j:, j:]) for j in range(columns)]
    gone = torch.zeros_like(left_OI, dtype=torch.bool)
    step = block if isinstance(pattern, float) else pattern.group
    for column in range(columns):
        if column % step == 0:
            coming = range(column, min(column + step, columns))
            scores = torch.stack([left_OI[:, j] ** 2 / inverses[j][0, 0] for j in coming], 1)
            rows = [scores.flatten()] if isinstance(pattern, float) else list(scores)
            for row, flat in enumerate(rows):
                share = pattern if isinstance(pattern, float) else pattern.dropped / pattern.group
                count = round(share * len(flat)) if isinstance(pattern, float) else int(share * len(flat))
                for place in sorted(range(len(flat)), key=lambda k: float(flat[k]))[:count]:
                    where = divmod(place, len(coming)) if isinstance(pattern, float) else (row, place)
                    gone[where[0], column + where[1]] = True
        for row in range(len(left_OI)):
            if gone[row, column]:
                direction = inverses[column][0] / inverses[column][0, 0]
                left_OI[row, column:] -= left_OI[row, column].clone() * direction
                left_OI[row, column] = 0
    return left_OI


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, GroupPattern(4, 8), 0.5, 0.3])
@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("columns", [24, 26])
def test_columns_are_eliminated_one_by_one(pattern, block, columns):
    """A factor transposed, errors spread to the wrong columns or twice, a share chosen too late or too early."""
    weight_OI, inputs_SI = example(columns=columns)
    hessian_II = hessian_of(inputs_SI)
    found = sparsegpt(weight_OI, hessian_II, pattern, block_columns=block)
    expected = by_elimination(weight_OI, hessian_II, pattern, block)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_what_stays_of_one_group_is_the_best_there_is():
    """Where the first two columns go, both others may still move: least squares says how far."""
    weight_OI, inputs_SI = example(rows=40, columns=4)
    weight_OI[:, :2] *= 0.3
    hessian_II = hessian_of(inputs_SI)
    found = sparsegpt(weight_OI, hessian_II, TWO_OF_FOUR)
    rows = (found[:, :2] == 0).all(1)
    assert rows.sum() > 5
    full_II, gone, kept = damped(hessian_II), slice(0, 2), slice(2, 4)
    moved = torch.linalg.solve(full_II[kept, kept], full_II[kept, gone] @ weight_OI[rows][:, gone].T).T
    torch.testing.assert_close(found[rows][:, kept], weight_OI[rows][:, kept] + moved)


def test_inputs_that_know_nothing_of_each_other_leave_magnitude():
    """With the identity there is nothing to make up with: the smallest go and the others stay."""
    weight_OI, _ = example()
    identity = torch.eye(24, dtype=torch.float64)
    assert torch.equal(sparsegpt(weight_OI, identity, TWO_OF_FOUR), magnitude(weight_OI, TWO_OF_FOUR))
    assert torch.equal(sparsegpt(weight_OI, identity, 0.4), magnitude(weight_OI, 0.4))
    nothing = torch.zeros(24, 24)
    assert torch.equal(sparsegpt(weight_OI, nothing, TWO_OF_FOUR), magnitude(weight_OI, TWO_OF_FOUR))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, 0.5, 0.7])
def test_the_output_changes_least(pattern):
    """Magnitude is no worse, or random no worse than magnitude: then nothing was made up for."""
    weight_OI, inputs_SI = example(rows=32, columns=256, tokens=1000)  # two blocks: one alone decides too early
    hessian_II, generator = hessian_of(inputs_SI), torch.Generator().manual_seed(3)
    errors = [
        relative_error(weight_OI, sparse_OI, hessian_II)
        for sparse_OI in (
            sparsegpt(weight_OI, hessian_II, pattern),
            magnitude(weight_OI, pattern),
            at_random(weight_OI, pattern, generator),
        )
    ]
    assert errors[0] < errors[1] < errors[2]


def test_the_relative_error_is_that_of_outputs():
    weight_OI, inputs_SI = example()
    sparse_OI = magnitude(weight_OI, 0.5)
    dense, sparse = (inputs_SI @ matrix_OI.T for matrix_OI in (weight_OI, sparse_OI))
    expected = float((dense - sparse).square().sum() / dense.square().sum())
    assert relative_error(weight_OI, sparse_OI, hessian_of(inputs_SI)) == pytest.approx(expected)


def test_columns_that_were_never_read_go_first_and_move_nothing():
    """A division by zero, or a matrix full of what is no number, where an input is always zero (as after a ReLU)."""
    weight_OI, inputs_SI = example()
    dead = [1, 6, 7, 12]
    inputs_SI[:, dead] = 0
    found = sparsegpt(weight_OI, hessian_of(inputs_SI), TWO_OF_FOUR)
    assert (found[:, dead] == 0).all()
    assert torch.isfinite(found).all()
    half = sparsegpt(weight_OI, hessian_of(inputs_SI), 0.01)
    assert torch.equal(half[:, dead][half[:, dead] != 0], weight_OI[:, dead][half[:, dead] != 0])


def test_the_scale_of_the_hessian_and_the_block_do_not_matter():
    """Sums over more workers, or means in place of sums, must not change the model."""
    weight_OI, inputs_SI = example(columns=64)
    hessian_II = hessian_of(inputs_SI)
    found = sparsegpt(weight_OI, hessian_II, TWO_OF_FOUR)
    torch.testing.assert_close(sparsegpt(weight_OI, hessian_II / 400, TWO_OF_FOUR), found)
    torch.testing.assert_close(sparsegpt(weight_OI, hessian_II, TWO_OF_FOUR, block_columns=12), found)


def test_activations_that_are_no_numbers_are_refused():
    weight_OI, inputs_SI = example()
    inputs_SI[3, 5] = float("nan")
    with pytest.raises(ValueError, match="no numbers"):
        sparsegpt(weight_OI, hessian_of(inputs_SI), TWO_OF_FOUR)


def test_the_type_of_the_weights_stays():
    weight_OI, inputs_SI = example()
    half = weight_OI.bfloat16()
    found = sparsegpt(half, hessian_of(inputs_SI), TWO_OF_FOUR)
    assert found.dtype == torch.bfloat16
    exact = sparsegpt(half.double(), hessian_of(inputs_SI), TWO_OF_FOUR)
    assert torch.equal(found, exact.bfloat16()), "rounded once, at the end"


def test_of_equal_scores_the_earlier_goes():
    """Sorting that is not stable: another model on another machine."""
    assert least(torch.ones(2, 6), TWO_OF_FOUR).tolist() == [[True, True, False, False, True, False]] * 2
    assert least(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 23))
    numbers = st.floats(-8, 8, width=32)
    weight = draw(arrays.arrays("float32", (rows, columns), elements=numbers))
    inputs = draw(arrays.arrays("float32", (draw(st.integers(1, 6)), columns), elements=numbers))
    return torch.from_numpy(weight), torch.from_numpy(inputs).double()


@given(matrices(), st.sampled_from(["sparsegpt", "magnitude", "random"]), st.sampled_from([4, 8, 128]))
def test_no_group_of_four_keeps_more_than_two(matrix, method, block):
    """Sizes that are no multiple of four, ties, zeros, columns never read: the pattern holds everywhere."""
    weight_OI, inputs_SI = matrix
    if method == "sparsegpt":
        found = sparsegpt(weight_OI, hessian_of(inputs_SI), TWO_OF_FOUR, block_columns=block)
    elif method == "magnitude":
        found = magnitude(weight_OI, TWO_OF_FOUR)
    else:
        found = at_random(weight_OI, TWO_OF_FOUR, torch.Generator().manual_seed(1))
    assert torch.isfinite(found).all()
    for group_OG in found.split(4, dim=1):
        assert int((group_OG != 0).sum(1).max()) <= 2


@given(matrices(), st.floats(0.05, 0.95))
def test_the_share_that_goes_is_the_one_asked_for(matrix, fraction):
    weight_OI, inputs_SI = matrix
    gone = round(fraction * weight_OI.numel())
    assert int(least(weight_OI.abs(), fraction).sum()) == gone
    assert int((sparsegpt(weight_OI, hessian_of(inputs_SI), fraction) == 0).sum()) >= gone
