"""Trackers by the files that they leave, read with the trackers' own readers."""

import math
import sys
import threading
from types import SimpleNamespace
from typing import get_args

import pytest
from test_metrics import CHECKPOINT, EVALUATION, RESUMED, START, STEP

from actors import trackers
from actors.trackers import TRACKERS, InThread, MLflow, TensorBoard, WeightsAndBiases, scalar_name
from shearing.training.config import TrackerName


def test_every_name_of_a_recipe_has_a_tracker():
    """A word that the recipe allows and nothing answers to."""
    assert set(TRACKERS) == set(get_args(TrackerName))


def test_names():
    assert scalar_name(("shear_proportion", (("domain", "wiki"),))) == "proportion/wiki"
    assert scalar_name(("shear_gradient_norm", ())) == "gradient_norm"


def test_tensorboard_reads_what_was_written(tmp_path):
    """Figures at the wrong step, or an earlier life's shown twice."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorBoard(str(tmp_path), "pruning")
    for row in (START, RESUMED, STEP | {"step": 1}):
        tracker.recall(row)
    for row in (STEP | {"step": 2}, STEP, EVALUATION, CHECKPOINT):
        tracker.see(row)
    (folder,) = (tmp_path / "tracking" / "tensorboard").iterdir()
    found = reading.EventAccumulator(str(folder), size_guidance={reading.TENSORS: 0})
    found.Reload()
    names = found.Tags()["tensors"]
    assert {"training_loss_nats_per_token", "loss_nats_per_token/wiki", "sparsity/head"} <= set(names)
    losses = found.Tensors("training_loss_nats_per_token")
    assert [(each.step, float(each.tensor_proto.float_val[0])) for each in losses] == [(2, 2.5), (3, 2.5)]
    spent = found.Tensors("spent_seconds/update")
    assert math.isclose(spent[-1].tensor_proto.float_val[0], 0.75), "what was recalled counts"
    assert not [name for name in names if "unix_seconds" in name]


def test_a_phase_that_goes_on_is_one_run_and_ends(monkeypatch):
    """Catches a Weights & Biases run more for every stop, phases in one run, and runs that look as if they went on."""
    begun, ended = [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(finish=lambda: ended.append(options["id"]))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for workspace, phase in (
        ("runs/a", "pruning"),
        ("runs/a", "pruning"),
        ("runs/a", "recovery"),
        ("runs/b", "pruning"),
    ):
        WeightsAndBiases(workspace, phase).close()
    names = [options["id"] for options in begun]
    assert names == ended
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert {options["resume"] for options in begun} == {"allow"}
    client = SimpleNamespace(set_terminated=ended.append)
    client.create_run = lambda *_, **__: SimpleNamespace(info=SimpleNamespace(run_id="mlflow-7"))
    experiment = SimpleNamespace(experiment_id="1")
    mlflow = SimpleNamespace(tracking=SimpleNamespace(MlflowClient=lambda: client), set_experiment=lambda _: experiment)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    MLflow("runs/a", "pruning").close()
    assert ended[-1] == "mlflow-7"


class Server:
    """A tracker whose server may hang or fail."""

    def __init__(self, answers: threading.Event, fails: bool = False):
        self.answers, self.fails, self.shown, self.closed = answers, fails, [], threading.Event()

    def __call__(self, workspace_uri, phase):
        return self

    def recall(self, row):
        self.shown.append(("recall", row))

    def see(self, row):
        assert self.answers.wait(timeout=60)
        if self.fails:
            raise ConnectionError("the server says no")
        self.shown.append(("see", row))

    def close(self):
        self.closed.set()


def test_a_server_that_hangs_holds_up_nobody(monkeypatch):
    """Catches a checkpoint that waits for a tracker, rows out of order, and rows that pile up for ever."""
    monkeypatch.setattr(trackers, "MOST_WAITING_ROWS", 5)
    monkeypatch.setattr(trackers, "CLOSED_WITHIN_S", 0.01)
    server = Server(threading.Event())
    tracker = InThread(server, "runs/a", "pruning")
    for step in range(20):
        tracker.recall({"step": step})
    for step in range(20, 25):
        tracker.see({"step": step})
    with pytest.raises(TimeoutError, match="5 rows"):
        tracker.see({"step": 25})
    tracker.close()
    assert not server.closed.is_set(), "it was not waited for"
    server.answers.set()
    assert server.closed.wait(timeout=60)
    assert [row["step"] for _, row in server.shown] == list(range(25))


def test_what_fails_in_the_thread_is_told_at_the_next_row():
    """Catches a tracker that failed without a word."""
    answering = threading.Event()
    answering.set()
    tracker = InThread(Server(answering, fails=True), "runs/a", "pruning")
    tracker.see({"step": 1})
    tracker._thread.join(timeout=60)
    with pytest.raises(ConnectionError, match="the server says no"):
        tracker.see({"step": 2})
    assert tracker.name == "Server"
