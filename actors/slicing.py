"""Slicing on the cluster: every worker holds a share of the calibration text, the driver walks the layers.

What the workers return is added up where the driver is: float64 sums, so that their number does not matter.
"""

import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import ray
import torch

from actors.tasks import task_result
from shearing.config import Config
from shearing.data.calibration import calibration_tokens
from shearing.data.manifest import load_manifest
from shearing.models.directories import local_directory, publish_directory
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import SlicingReport, slice_model
from shearing.pruning.slicing.job import LayerReport
from shearing.pruning.slicing.work import STATE_FILE
from shearing.storage import Store, open_store
from shearing.training.config import EngineConfig
from shearing.training.engine import DTYPES

OnLayer = Callable[[LayerReport, dict[str, Any]], None]


class SlicingSettings(Config):
    """One slicing run; plain values, so that they travel to any node. Directories and the corpus by path or URI."""

    source: str
    destination: str
    work: str
    corpus: str
    proportions: dict[str, float]
    slicing: SlicingConfig
    engine: EngineConfig
    seed: int


class CalibrationWorker:
    """One share of the calibration text in a process of its own: every `world`-th sequence, from `rank` on."""

    def __init__(self, settings: SlicingSettings, rank: int, world: int) -> None:
        engine, sequences = settings.engine, settings.slicing.calibration.sequences
        torch.set_num_threads(max(1, int(engine.cpus_per_worker)))
        tokens_NT = calibration_tokens(open_store(settings.corpus), settings.proportions, sequences, settings.seed)
        self._share = CalibrationShare(
            local_directory(settings.source),
            torch.from_numpy(tokens_NT[rank::world].astype(np.int64)),
            batch_sequences=engine.micro_batch_sequences,
            dtype=DTYPES[engine.dtype],
            device="cuda" if engine.gpus_per_worker else "cpu",
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the share returns."""
        return getattr(self._share, method)(*arguments)

    def peak_bytes(self) -> int:
        """Most memory that this process has held: on its device where it has one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak_bytes()


class SharesOnCluster:
    """The shares of all workers, as `slice_model` speaks to them."""

    def __init__(self, workers: list[Any], text: str) -> None:
        self._workers, self._text = workers, text

    def map(self, method: str, *arguments: Any) -> Iterable[Any]:
        """What every share's method returns, in the order of the shares; an argument travels once to each node."""
        if method == "digest":  # of the whole text: another number of workers goes on where these stopped
            return [self._text]
        placed = [ray.put(argument) for argument in arguments]
        found: list[Any] = task_result([worker.call.remote(method, *placed) for worker in self._workers])
        return found

    def peak_bytes(self) -> int:
        """Most memory that any worker has held."""
        return max(ray.get([worker.peak_bytes.remote() for worker in self._workers]))


def slice_on_cluster(settings: SlicingSettings, on_layer: OnLayer, on_loss: Callable[[str], None]) -> SlicingReport:
    """Slice a model; a run that was stopped, or lost a worker, goes on at its last finished layer.

    Args:
        settings: What to slice, how and where.
        on_layer: Called after every layer with what was found and its figures: `seconds`, and the most bytes that
            driver and workers have held so far.
        on_loss: Called with a sentence where a worker died and all are started again.

    Raises:
        UserError: A model that cannot be sliced so, or work in progress of another run.
        ray.exceptions.RayActorError: Workers died more often than `engine.max_failures`.
    """
    failures = 0
    while True:
        try:
            with _workers(settings) as shares, _local_work(settings) as (work, keep):
                return _slice(settings, shares, work, keep, on_layer)
        except ray.exceptions.RayActorError as error:
            failures += 1
            if 0 <= settings.engine.max_failures < failures:
                raise
            on_loss(f"a worker died and all are started again: {str(error).splitlines()[0]}")


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
            local_directory(settings.source),
            target,
            work,
            settings.slicing,
            shares,
            dtype=DTYPES[settings.engine.dtype],
            on_layer=finished,
        )
        publish_directory(target, destination)
    open_store(settings.work).delete()
    return found


@contextlib.contextmanager
def _workers(settings: SlicingSettings) -> Iterator[SharesOnCluster]:
    engine = settings.engine
    world = min(engine.workers, settings.slicing.calibration.sequences)
    options = {"num_cpus": engine.cpus_per_worker, "num_gpus": engine.gpus_per_worker}
    remote: Any = ray.remote(CalibrationWorker).options(**options)
    workers = [remote.remote(settings, rank, world) for rank in range(world)]
    fingerprint = load_manifest(open_store(settings.corpus)).fingerprint
    text = f"{settings.slicing.calibration.sequences} sequences of {fingerprint}, seed {settings.seed}"
    try:
        yield SharesOnCluster(workers, text)
    finally:
        for worker in workers:
            ray.kill(worker)


@contextlib.contextmanager
def _local_work(settings: SlicingSettings) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A local folder with the work in progress, and what brings it to where it is kept once a layer is finished."""
    store = open_store(settings.work)
    if store.is_local:
        yield Path(store.path), lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="shear-slicing-") as folder:
        if store.exists():
            pafs.copy_files(store.path, folder, source_filesystem=store.filesystem)
        yield Path(folder), lambda: _keep(Path(folder), store)


def _keep(folder: Path, store: Store) -> None:
    """Copy what is new; the list of what is finished goes last, so that it never names what is not there."""
    for path in sorted(folder.rglob("*.*"), key=lambda path: path.name == STATE_FILE):
        name = str(path.relative_to(folder))
        if path.is_file() and (path.name == STATE_FILE or not store.exists(name)):
            store.filesystem.create_dir(os.path.dirname(store.locate(name)), recursive=True)
            pafs.copy_files(str(path), store.locate(name), destination_filesystem=store.filesystem)


def process_peak_bytes() -> int:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
