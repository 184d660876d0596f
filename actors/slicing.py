"""Slicing on the cluster: every worker holds a share of the calibration text, the driver walks the layers.

What the workers return is added up where the driver is: float64 sums, so that their number does not matter.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import SlicingReport, slice_model
from shearing.pruning.slicing.job import LayerReport
from shearing.storage import open_store
from shearing.training.engine import DTYPES

OnLayer = Callable[[LayerReport, dict[str, Any]], None]


class SlicingSettings(Config):
    """One slicing run; plain values, so that they travel to any node. Directories and the corpus by path or URI."""

    destination: str
    work: str
    slicing: SlicingConfig
    calibration: CalibrationSettings


def slice_on_cluster(settings: SlicingSettings, on_layer: OnLayer, on_loss: Callable[[str], None]) -> SlicingReport:
    """Slice a model; a run that was stopped, or lost a worker, goes on at its last finished layer.

    The caller deletes `settings.work` once it needs no slicing any more.

    Args:
        settings: What to slice, how and where.
        on_layer: Called after every layer with what was found and its figures: `seconds`, and the most bytes that
            driver and workers have held so far.
        on_loss: Called with a sentence where a worker died and all are started again.

    Raises:
        UserError: A model that cannot be sliced so, or work in progress of another run.
        ray.exceptions.RayActorError: Workers died more often than `engine.max_failures`.
    """

    def work() -> SlicingReport:
        with calibration_workers(CalibrationShare, settings.calibration) as shares, local_work(settings.work) as place:
            return _slice(settings, shares, *place, on_layer)

    report: SlicingReport = until_done(work, settings.calibration.engine.max_failures, on_loss)
    return report


def _slice(
    settings: SlicingSettings, shares: SharesOnCluster, work: Path, keep: Callable[[], None], on_layer: OnLayer
) -> SlicingReport:
    shares.peak_bytes()  # answers once all workers stand: the first layer's seconds are its own
    began_s = time.perf_counter()

    def finished(report: LayerReport) -> None:
        nonlocal began_s
        keep()
        now_s = time.perf_counter()
        figures = {
            "seconds": now_s - began_s,
            "driver_peak_bytes": process_peak_bytes(),
            "worker_peak_bytes": shares.peak_bytes(),
        }
        began_s = now_s
        on_layer(report, figures)

    destination = open_store(settings.destination)
    with tempfile.TemporaryDirectory(prefix="shear-sliced-") as folder:
        target = Path(destination.path) if destination.is_local else Path(folder) / "sliced"
        found = slice_model(
            local_directory(settings.calibration.source),
            target,
            work,
            settings.slicing,
            shares,
            dtype=DTYPES[settings.calibration.engine.dtype],
            on_layer=finished,
        )
        publish_directory(target, destination)
    return found
