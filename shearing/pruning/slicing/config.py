"""What a recipe says about slicing."""

from typing import Literal

from pydantic import Field

from shearing.config import Config
from shearing.pruning.config import CalibrationConfig

DEFAULT_FRACTION = 0.25


class SlicingConfig(Config):
    """The residual stream rotated to its principal directions and sliced (SliceGPT, arXiv 2401.15024)."""

    fraction: float | None = Field(
        None, ge=0, lt=1, description=f"Of every signal's dimensions that goes; default {DEFAULT_FRACTION}"
    )
    hidden_size: int | None = Field(None, ge=1, description="What stays of every signal, in place of a fraction")
    schedule: list[float] | None = Field(
        None, description="In place of a fraction, one a layer: of the signal that it reads and of the one inside it"
    )
    orientation: Literal["pca", "random"] = Field(
        "pca", description="Of what stays: principal directions, or those turned at random, kinder to quantisation"
    )
    head: bool = Field(False, description="Slice the last signal, which the LM head reads, as well")
    rotation: Literal["per_signal", "shared"] = Field(
        "per_signal", description="One rotation a signal; or one for all, which leaves a plain model of the family"
    )
    seed: int = Field(0, ge=0, description="Of the random orientation")
    calibration: CalibrationConfig = CalibrationConfig()
