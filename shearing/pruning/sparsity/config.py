"""What a recipe says about zeros in place: weights that go while every matrix keeps its shape."""

from typing import Literal

from pydantic import Field, model_validator

from shearing.config import Config
from shearing.pruning.config import CalibrationConfig

DEFAULT_FRACTION = 0.5
SparsityMethod = Literal["sparsegpt", "magnitude", "random"]


class SparsityConfig(Config):
    """Zeros in the linear layers of every decoder layer (SparseGPT, arXiv 2301.00774); one-shot, without training."""

    pattern: Literal["2:4", "unstructured"] = Field(
        "2:4", description="Two of every four neighbours in a row; or as many anywhere as `fraction` says"
    )
    fraction: float | None = Field(
        None, gt=0, lt=1, description=f"Of the weights of every matrix, unstructured; default {DEFAULT_FRACTION}"
    )
    method: SparsityMethod = Field("sparsegpt", description="The last two are the floors of every comparison")
    seed: int = Field(0, ge=0, description="Of `random`")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="Only `sparsegpt` reads it")

    @model_validator(mode="after")
    def _pattern_alone_says_how_much(self) -> "SparsityConfig":
        if self.pattern == "2:4" and self.fraction is not None:
            raise ValueError(
                f"fraction = {self.fraction} with pattern = 2:4, which always drops half; allowed: one of them. Remove "
                "fraction, or set pattern=unstructured"
            )
        return self

    @property
    def dropped(self) -> float:
        """Share of the weights that goes."""
        return DEFAULT_FRACTION if self.fraction is None else self.fraction
