"""Calibration text on the cluster: every worker holds a share of it, and the driver walks a model's layers with them.

What the workers return is added up where the driver is: float64 sums, so that their number does not matter.
"""

import contextlib
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.tasks import task_result
from shearing.config import Config
from shearing.data.calibration import calibration_tokens
from shearing.data.manifest import load_manifest
from shearing.models.directories import local_directory
from shearing.storage import Store, open_store
from shearing.training.config import EngineConfig
from shearing.training.engine import DTYPES


class CalibrationSettings(Config):
    """Which text goes through which model, and on what; the model and the corpus by path or URI."""

    source: str
    corpus: str
    proportions: dict[str, float]
    sequences: int
    engine: EngineConfig
    seed: int


class CalibrationWorker:
    """One share of the calibration text in a process of its own: every `world`-th sequence, from `rank` on.

    Args:
        share: Class of the share: a folder, token ids and how they run through a layer go in.
        settings: Of all workers.
        rank: Of this one.
        world: How many there are.
    """

    def __init__(self, share: Callable[..., Any], settings: CalibrationSettings, rank: int, world: int) -> None:
        engine = settings.engine
        torch.set_num_threads(max(1, int(engine.cpus_per_worker)))
        corpus = open_store(settings.corpus)
        tokens_NT = calibration_tokens(corpus, settings.proportions, settings.sequences, settings.seed)
        self._device = "cuda" if engine.gpus_per_worker else "cpu"
        self._share = share(
            local_directory(settings.source),
            torch.from_numpy(tokens_NT[rank::world].astype(np.int64)),
            batch_sequences=engine.micro_batch_sequences,
            dtype=DTYPES[engine.dtype],
            device=self._device,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the share returns."""
        return getattr(self._share, method)(*arguments)

    def peak_bytes(self) -> int:
        """Most memory that this process has held: on its device where it has one."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else process_peak_bytes()


class SharesOnCluster:
    """The shares of all workers."""

    def __init__(self, workers: list[Any], text: str) -> None:
        self._workers, self.text = workers, text

    def map(self, method: str, *arguments: Any) -> Iterable[Any]:
        """What every share's method returns, in the order of the shares; an argument travels once to each node."""
        if method == "digest":  # of the whole text: another number of workers goes on where these stopped
            return [self.text]
        placed = [ray.put(argument) for argument in arguments]
        found: list[Any] = task_result([worker.call.remote(method, *placed) for worker in self._workers])
        return found

    def peak_bytes(self) -> int:
        """Most memory that any worker has held."""
        return max(ray.get([worker.peak_bytes.remote() for worker in self._workers]))


@contextlib.contextmanager
def calibration_workers(share: Callable[..., Any], settings: CalibrationSettings) -> Iterator[SharesOnCluster]:
    """The workers of a calibration, which end with it."""
    engine = settings.engine
    world = min(engine.least_workers, settings.sequences)
    options = {"num_cpus": engine.cpus_per_worker, "num_gpus": engine.gpus_per_worker}
    remote: Any = ray.remote(CalibrationWorker).options(**options)
    workers = [remote.remote(share, settings, rank, world) for rank in range(world)]
    fingerprint = load_manifest(open_store(settings.corpus)).fingerprint
    try:
        yield SharesOnCluster(workers, f"{settings.sequences} sequences of {fingerprint}, seed {settings.seed}")
    finally:
        for worker in workers:
            ray.kill(worker)


def until_done(work: Callable[[], Any], max_failures: int, on_loss: Callable[[str], None]) -> Any:
    """What `work` returns; it is done again, at most so many times (-1: without limit), where a worker dies.

    Raises ray.exceptions.RayActorError where workers died more often.
    """
    failures = 0
    while True:
        try:
            return work()
        except ray.exceptions.RayActorError as error:
            failures += 1
            if 0 <= max_failures < failures:
                raise
            on_loss(f"a worker died and all are started again: {str(error).splitlines()[0]}")


@contextlib.contextmanager
def local_work(uri: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A local folder with the work in progress, and what brings it to where it is kept once a layer is finished."""
    store = open_store(uri)
    if store.is_local:
        yield Path(store.path), lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="shear-layers-") as folder:
        if store.exists():
            store.download(Path(folder))
        yield Path(folder), lambda: _keep(Path(folder), store)


def _keep(folder: Path, store: Store) -> None:
    """Copy what is new; JSON, which names what is finished, goes last, so that it never names what is not there."""
    for path in sorted(folder.rglob("*.*"), key=lambda path: path.suffix == ".json"):
        name = str(path.relative_to(folder))
        if path.is_file() and (path.suffix == ".json" or not store.exists(name)):
            store.upload(path, name)


def process_peak_bytes() -> int:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
