"""Experiment trackers that a recipe asks for by name, fed with the same figures as the metrics."""

import hashlib
import threading
import time
from queue import SimpleQueue
from typing import Any

from actors.metrics import AGES, Figures, Key, run_name
from actors.run_log import MakeWatcher, name_of
from shearing.storage import open_store
from shearing.training.config import TrackerName

FOLDER = "tracking"
MOST_WAITING_ROWS = 1000
CLOSED_WITHIN_S = 20.0
CLOCKS = (*AGES, "shear_step")


class Tracker:
    """What all trackers share: rows become named scalars at a step.

    A resumed phase repeats the steps after its checkpoint; a tracker then holds such a step twice.
    """

    def __init__(self) -> None:
        self.figures = Figures()

    def recall(self, row: dict[str, Any]) -> None:
        """Take in a row that was shown already, so that sums go on."""
        self.figures.see(row)

    def see(self, row: dict[str, Any]) -> None:
        """Show what a new row says."""
        self.figures.see(row)
        scalars = {scalar_name(key): value for key, value in self.figures.changed.items() if key[0] not in CLOCKS}
        self.write(scalars, row["step"])

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Hand scalars to the tracker."""
        raise NotImplementedError

    def close(self) -> None:
        """Hand over what waits, and say that the run is at its end."""
        raise NotImplementedError


def scalar_name(key: Key) -> str:
    """`loss_nats_per_token/wiki` of a metric's name and labels."""
    name, labels = key
    return "/".join([name.removeprefix("shear_"), *(value for _, value in labels)])


class TensorBoard(Tracker):
    """Event files in `<workspace>/tracking/tensorboard/<phase>`; the workspace has to be a folder."""

    def __init__(self, workspace_uri: str, phase: str) -> None:
        super().__init__()
        from tensorboard.summary import Writer

        folder = open_store(workspace_uri).child(f"{FOLDER}/tensorboard/{phase}")
        self.writer = Writer(folder.path)

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Append to the event file."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step=step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run for each phase, however often it goes on; account and mode come from wandb's environment variables."""

    def __init__(self, workspace_uri: str, phase: str) -> None:
        super().__init__()
        import wandb

        name = hashlib.sha256(f"{workspace_uri} {phase}".encode()).hexdigest()[:16]
        self.run = wandb.init(project="shear", name=phase, group=run_name(workspace_uri), id=name, resume="allow")

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Log with the phase's own step, since wandb's may not go back when a phase resumes."""
        self.run.log(scalars | {"training_step": step})

    def close(self) -> None:
        """Upload the rest."""
        self.run.finish()


class MLflow(Tracker):
    """A run for each phase, and for each time it goes on; the server comes from MLFLOW_TRACKING_URI."""

    def __init__(self, workspace_uri: str, phase: str) -> None:
        super().__init__()
        import mlflow

        self.client = mlflow.tracking.MlflowClient()
        experiment = mlflow.set_experiment("shear")
        tags = {"workspace": run_name(workspace_uri), "phase": phase}
        self.run_id = self.client.create_run(experiment.experiment_id, tags=tags, run_name=phase).info.run_id

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Log in one request."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(name, value, now_ms, step) for name, value in scalars.items()])

    def close(self) -> None:
        """The run is not shown as going on for ever."""
        self.client.set_terminated(self.run_id)


class InThread:
    """A watcher in a thread of its own, so that a server which does not answer holds up neither log nor checkpoint.

    What it raised is raised at the next row; so is TimeoutError, where MOST_WAITING_ROWS are still to be shown.
    """

    def __init__(self, make: MakeWatcher, workspace_uri: str, phase: str) -> None:
        self.name = name_of(make)
        self._rows: SimpleQueue[tuple[str, dict[str, Any]] | None] = SimpleQueue()
        self._handed = self._shown = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._show, args=(make, workspace_uri, phase), name=self.name, daemon=True
        )
        self._thread.start()

    def recall(self, row: dict[str, Any]) -> None:
        """Hand over a row that was shown already; however many there are."""
        self._rows.put(("recall", row))

    def see(self, row: dict[str, Any]) -> None:
        """Hand over a new row."""
        if self._error is not None:
            raise self._error
        if self._handed - self._shown >= MOST_WAITING_ROWS:
            raise TimeoutError(f"it has {MOST_WAITING_ROWS:,} rows still to show")
        self._handed += 1
        self._rows.put(("see", row))

    def close(self) -> None:
        """Give the watcher some time to show what waits, and to close."""
        self._rows.put(None)
        self._thread.join(timeout=CLOSED_WITHIN_S)

    def _show(self, make: MakeWatcher, workspace_uri: str, phase: str) -> None:
        try:
            watcher = make(workspace_uri, phase)
            while (given := self._rows.get()) is not None:
                how, row = given
                getattr(watcher, how)(row)
                self._shown += how == "see"
            watcher.close()
        except Exception as error:
            self._error = error


TRACKERS: dict[TrackerName, MakeWatcher] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
