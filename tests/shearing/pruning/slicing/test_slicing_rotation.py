"""Rotations against brute force, and covariances against sequences taken one by one."""

import pytest
import torch
from sliced_models import SLICEABLE, TEXT, saved
from tiny_models import shapes_of

from shearing.models.families import FAMILIES
from shearing.models.loading import read_config
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.plan import halves_of
from shearing.pruning.slicing.rotation import random_orthogonal, rotation_of, shared_rotation

RANDOM = torch.Generator().manual_seed(2)
SIGNAL = torch.randn(200, 12, dtype=torch.float64, generator=RANDOM) @ torch.diag(
    torch.linspace(2, 0.1, 12, dtype=torch.float64)
)


def lost(basis):
    return float((SIGNAL - SIGNAL @ basis @ basis.T).pow(2).sum())


@pytest.mark.parametrize("orientation", ["pca", "random"])
def test_no_other_space_of_that_size_holds_more(orientation):
    found = rotation_of(SIGNAL.T @ SIGNAL, 5, orientation, seed=1)
    torch.testing.assert_close(found.basis_DK.T @ found.basis_DK, torch.eye(5, dtype=torch.float64))
    best = torch.linalg.svd(SIGNAL).S[5:].pow(2).sum()  # Eckart and Young
    assert lost(found.basis_DK) == pytest.approx(float(best))
    assert found.kept_variance == pytest.approx(1 - float(best / SIGNAL.pow(2).sum()))


def test_directions_come_by_falling_eigenvalue():
    basis = rotation_of(SIGNAL.T @ SIGNAL, 12, "pca", seed=0).basis_DK
    sizes = (SIGNAL @ basis).pow(2).sum(0)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_random_matrices_are_orthogonal_and_drawn_from_all_of_them():
    """Catches a QR without its signs: the first entry would never be positive, or never negative."""
    drawn = [random_orthogonal(6, seed) for seed in range(40)]
    for matrix in drawn:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))
    for place in range(6):
        assert 5 < sum(bool(matrix[place, place] > 0) for matrix in drawn) < 35
    assert torch.equal(drawn[3], random_orthogonal(6, 3))


@pytest.mark.parametrize("size", [12, 7])
def test_a_shared_rotation_for_layer_norms_leaves_no_mean(size):
    """Catches a LayerNorm that subtracts something, and a dimension lost for nothing at full size."""
    signal = SIGNAL - SIGNAL.mean(-1, keepdim=True)
    found = shared_rotation(FAMILIES["phi"], signal.T @ signal, size, "pca", seed=0)
    turned = signal @ found.basis_DK
    assert turned.shape[-1] == size
    assert turned.mean(-1).abs().max() < 1e-12
    best = torch.linalg.svd(signal).S[: size - 1].pow(2).sum()
    assert float(turned.pow(2).sum()) == pytest.approx(float(best))
    if size == 12:
        torch.testing.assert_close(turned @ turned.T, signal @ signal.T)


@pytest.mark.parametrize("variant", SLICEABLE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(variant, side, tmp_path):
    """Catches padding in a covariance, and padding that attention listens to."""
    source = saved(tmp_path / "source", variant, shapes_of(variant)[-1])
    lengths = [12, 5, 9]
    tokens, mask = TEXT[:3].clone(), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(12 - length, None) if side == "left" else slice(length)] = 1
    alone = [CalibrationShare(source, tokens[row : row + 1, mask[row] == 1]) for row in range(3)]
    padded = CalibrationShare(source, tokens, mask, batch_sequences=2)
    basis = torch.linalg.qr(torch.randn(padded._size, 16, dtype=torch.float64, generator=RANDOM)).Q
    for share in (*alone, padded):
        share.embed()
    for layer in range(3):
        for half in halves_of(read_config(source)):
            for share in (*alone, padded):
                share.follow(layer, half, basis)
            total = sum(share.covariance() for share in alone)
            torch.testing.assert_close(padded.covariance(), total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def test_covariances_are_in_double_precision(tmp_path):
    """Single precision ruins large models: the sum of squares of float32 values must be exact to float64."""
    share = CalibrationShare(saved(tmp_path / "source", "llama", shapes_of("llama")[0]), TEXT)
    share.embed()
    hidden = torch.cat([batch.flatten(0, 1) for batch in share._hidden]).double()
    torch.testing.assert_close(share.covariance(), hidden.T @ hidden, rtol=1e-12, atol=1e-12)
