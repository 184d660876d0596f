"""The model between bare norms with every signal turned at random and nothing sliced: it must equal its source."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from shearing.models.families import Family
from shearing.models.family import family_of, shape_of
from shearing.models.loading import read_config
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import slice_model


class NoText:
    """In place of shares of calibration text: all directions that a signal can have weigh the same."""

    def __init__(self, family: Family, size: int) -> None:
        self._family, self._size = family, size

    def map(self, method: str, *_arguments: Any) -> Iterable[Any]:
        """A covariance that prefers nothing; there is nobody to be led through the layers.

        Before a LayerNorm signals have mean zero once they are fused, which leaves one direction out.
        """
        covariance_DD = torch.eye(self._size, dtype=torch.float64)
        if self._family.norm == "layer":
            covariance_DD -= 1 / self._size
        answers: dict[str, list[Any]] = {"digest": ["no text"], "covariance": [covariance_DD]}
        return answers.get(method, [])


def write_rotated_model(source: Path, folder: Path, slicing: SlicingConfig, dtype: torch.dtype) -> None:
    """Writes `folder`/rotated: what `slicing` makes of a source with all dimensions kept, in random directions.

    Fusion and rotation are those that slicing does, so that an error in them shows as another loss than the source's.

    Args:
        source: The source model's directory.
        folder: Where; work in progress lies beside.
        slicing: Its kind of rotation counts.
        dtype: Of the weights.
    """
    whole = SlicingConfig(fraction=0.0, orientation="random", head=True, rotation=slicing.rotation, seed=slicing.seed)
    config = read_config(source)
    shares = NoText(family_of(config), shape_of(config).hidden_size)
    slice_model(source, folder / "rotated", folder / "work", whole, shares, dtype=dtype)
