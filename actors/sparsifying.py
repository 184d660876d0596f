"""Zeros on the cluster: every worker holds a share of the calibration text, the driver prunes layer after layer."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.calibration import (
    CalibrationSettings,
    SharesOnCluster,
    calibration_workers,
    local_work,
    process_peak_bytes,
    until_done,
)
from shearing.config import Config
from shearing.models.directories import local_directory, publish_directory
from shearing.pruning.sparsity.calibration import CalibrationShare, Hessians, add_hessians
from shearing.pruning.sparsity.config import SparsityConfig
from shearing.pruning.sparsity.layers import FinishedLayers, LinearRecord, sparse_layers, write_sparse_model
from shearing.storage import open_store

OnLayer = Callable[[int, dict[str, LinearRecord], dict[str, Any]], None]


class SparsifyingSettings(Config):
    """What to make sparse, how and where; plain values, so that they travel to any node."""

    destination: str
    work: str
    sparsifying: SparsityConfig
    calibration: CalibrationSettings


class CalibrationOnCluster:
    """All calibration text on its way through the model, in shares whose sums are added."""

    def __init__(self, shares: SharesOnCluster) -> None:
        self._shares = shares

    def digest(self) -> str:
        """A name for the text."""
        return self._shares.text

    def embed(self) -> None:
        """Go to what the first layer reads."""
        list(self._shares.map("embed"))

    def hessians(self, layer: int) -> Hessians:
        """Sums over the inputs of the linear layers in the decoder layer that is reached."""
        return add_hessians(list(self._shares.map("hessians", layer)))

    def follow(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Go past that layer with these weights in it."""
        list(self._shares.map("follow", layer, dict(weights)))


def sparsify_on_cluster(
    settings: SparsifyingSettings, on_layer: OnLayer, on_loss: Callable[[str], None]
) -> dict[str, Any]:
    """Make a model sparse; a run that was stopped, or lost a worker, goes on at its last finished layer.

    The caller deletes `settings.work` once it needs no sparsifying any more.

    Args:
        settings: What, how and where.
        on_layer: Called after every layer with its number, what became of its linear layers, and figures: `seconds`,
            and the most bytes that the driver has held so far.
        on_loss: Called with a sentence where a worker died and all are started again.

    Returns:
        The record that lies beside the weights as sparsity.json.

    Raises:
        ray.exceptions.RayActorError: Workers died more often than `engine.max_failures`.
    """

    def work() -> dict[str, Any]:
        with local_work(settings.work) as place:
            if settings.sparsifying.method != "sparsegpt":  # which alone looks at text
                return _sparsify(settings, None, *place, on_layer)
            with calibration_workers(CalibrationShare, settings.calibration) as shares:
                return _sparsify(settings, CalibrationOnCluster(shares), *place, on_layer)

    record: dict[str, Any] = until_done(work, settings.calibration.engine.max_failures, on_loss)
    return record


def _sparsify(
    settings: SparsifyingSettings,
    calibration: CalibrationOnCluster | None,
    folder: Path,
    keep: Callable[[], None],
    on_layer: OnLayer,
) -> dict[str, Any]:
    source, config = local_directory(settings.calibration.source), settings.sparsifying
    text = None if calibration is None else calibration.digest()
    looked_at = text and f"{text}, in {settings.calibration.engine.dtype}"
    finished = FinishedLayers(folder, source, config, looked_at)
    began_s = time.perf_counter()
    for layer, records in enumerate(sparse_layers(source, config, calibration, finished)):
        keep()
        now_s = time.perf_counter()
        on_layer(layer, records, {"seconds": now_s - began_s, "driver_peak_bytes": process_peak_bytes()})
        began_s = now_s
    with tempfile.TemporaryDirectory(prefix="shear-sparse-") as made:
        record = write_sparse_model(source, Path(made) / "sparse", config, text, finished)
        publish_directory(Path(made) / "sparse", open_store(settings.destination))
    return record
