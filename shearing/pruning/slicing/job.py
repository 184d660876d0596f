"""What a slicing run works with: the source, the shares of calibration text, what is finished."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from shearing.models.layerwise import LayerwiseModel
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import halves_of
from shearing.pruning.slicing.weights import RotatedWeights
from shearing.pruning.slicing.work import SlicingWork


class Shares(Protocol):
    """Shares of the calibration text, here or elsewhere; see `CalibrationShare` for their methods."""

    def map(self, method: str, *args: Any) -> Iterable[Any]:
        """What every share's method returns, in the order of the shares, when all have done it."""


class SharesHere:
    """Shares in this process."""

    def __init__(self, shares: Iterable[CalibrationShare]) -> None:
        self._shares = list(shares)

    def map(self, method: str, *args: Any) -> Iterable[Any]:
        """What every share's method returns."""
        return [getattr(share, method)(*args) for share in self._shares]


@dataclass(frozen=True)
class LayerReport:
    """A layer that is finished.

    Attributes:
        layer: Its number.
        num_layers: How many there are.
        kept_variance: Share of the sum of squares that slicing leaves of the signals it makes, by the half of the layer
            before each; with a shared rotation, empty: that is known at the end only.
    """

    layer: int
    num_layers: int
    kept_variance: Mapping[str, float]


@dataclass(frozen=True)
class SlicingJob:
    """One run.

    Attributes:
        model: The source.
        slicing: What is asked for.
        shares: The calibration text.
        work: What is finished.
        weights: Of the result.
        on_layer: Called after every layer.
    """

    model: LayerwiseModel
    slicing: SlicingConfig
    shares: Shares
    work: SlicingWork
    weights: RotatedWeights
    on_layer: Callable[[LayerReport], None] | None

    @property
    def halves(self) -> tuple[str, ...]:
        """Parts of a layer after each of which there is a signal."""
        return halves_of(self.model.config)

    def covariance(self) -> Tensor:
        """Of the present signal, over all shares, float64 [D, D]; always added in the same order."""
        total_DD, *others = self.shares.map("covariance")
        for share_DD in others:
            total_DD += share_DD
        return total_DD

    def tell(self, layer: int, kept_variance: Mapping[str, float]) -> None:
        """Reports a layer that is finished."""
        if self.on_layer is not None:
            self.on_layer(LayerReport(layer, self.model.num_layers, kept_variance))
