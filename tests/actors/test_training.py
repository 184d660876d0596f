"""How a phase ends when its driver is asked to stop, and what is tried again. Whole phases: tests/test_faults.py."""

import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import ray
import ray.train
from failing_storage import AWAY, failing_store
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from actors import checkpoints, training
from actors.run_log import RunLog
from shearing.patience import StorageError
from shearing.training.config import EngineConfig


def interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_a_driver_asked_to_stop_waits_for_the_workers_checkpoint():
    """Catches a wait that a signal cuts short for good: the actors ended with it, before the checkpoint was written."""
    asked, saved = threading.Event(), threading.Event()

    def work() -> dict[str, str]:
        asked.wait(timeout=30)
        time.sleep(0.5)  # a checkpoint takes a while
        saved.set()
        return {"checkpoint": "step-00000011"}

    def leave() -> float:
        asked.set()
        return 30.0

    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        training._in_thread(work, leave)
    assert saved.is_set()


def test_workers_that_never_leave_are_left_behind():
    over = threading.Event()
    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        training._in_thread(lambda: {"late": over.wait(timeout=30)}, lambda: 0.2)
    over.set()


def test_what_the_phase_returns_or_raises_comes_back():
    assert training._in_thread(lambda: {"checkpoint": "last"}, pytest.fail) == {"checkpoint": "last"}
    with pytest.raises(RuntimeError, match="as it was"):
        training._in_thread(lambda: (_ for _ in ()).throw(RuntimeError("as it was")), pytest.fail)


def test_what_killed_workers_had_begun_to_save_is_removed(tmp_path, monkeypatch):
    """Catches a node's disk that fills up by a checkpoint for each worker killed; the folder of one at work gone."""
    monkeypatch.setattr(checkpoints.tempfile, "gettempdir", lambda: str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    prefix = checkpoints.upload_prefix("/runs/x/checkpoints/recovery")
    other = checkpoints.upload_prefix("/runs/y/checkpoints/recovery")
    kept = [f"{prefix}{os.getpid()}-a", f"{other}{gone.pid}-b", "something-else"]
    for name in [*kept, f"{prefix}{gone.pid}-c"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("many")
    checkpoints.remove_left_uploads(prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_trackers_are_closed_before_their_log_is_killed(ray_session, tmp_path):
    """Catches a log that is killed with its trackers open, and an end that fails since the log is gone already."""

    class Tracker:
        def __init__(self, workspace_uri, _phase):
            self.folder = workspace_uri

        def close(self):
            with open(f"{self.folder}/closed", "w") as file:
                file.write("closed")

    log = ray.remote(num_cpus=0)(RunLog).remote(str(tmp_path), "pruning", [Tracker])
    training._close(log)
    assert (tmp_path / "closed").exists()
    ray.kill(log)
    training._close(log)


class TestFitGroup:
    """With a stand-in for Ray Train, which does what each test says."""

    NOT_UP = ray.exceptions.ActorDiedError(ray.exceptions.RayTaskError("__init__", "Traceback ...", AWAY))

    @pytest.fixture
    def fit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(training, "count_nodes", lambda: None)
        monkeypatch.setattr(training, "resolve", lambda _uri: (None, ""))
        monkeypatch.setattr(training.ray, "put", lambda value: value)
        store, handler = failing_store(tmp_path)
        sizes, said = [], []

        def run(*outcomes, workers=1):
            """What comes of groups that end so, one after another, and how many of them there were."""
            left = list(outcomes)

            def end():
                outcome = left.pop(0)
                if callable(outcome):
                    outcome = outcome(handler)
                if isinstance(outcome, BaseException):
                    raise outcome
                return SimpleNamespace(return_value=outcome)

            def make(*_args, scaling_config, **_words):
                sizes.append(scaling_config.num_workers)
                return SimpleNamespace(fit=end)

            monkeypatch.setattr(training, "TorchTrainer", make)
            phase = SimpleNamespace(name="pruning", engine=EngineConfig(workers=workers))
            try:
                return training._fit_group(phase, {}, store, said.append), len(outcomes) - len(left)
            except Exception as error:
                return error, len(outcomes) - len(left)

        run.sizes, run.said = sizes, said
        return run

    def test_an_elastic_group_without_room_is_tried_with_what_is_free(self, fit, monkeypatch):
        # catches a run that left for more workers and never comes back, since other jobs hold what Ray counts as free
        free = iter([[{"CPU": 3.5}, {"CPU": 1.0}], [{"CPU": 0.5}], [{"CPU": 64.0}]])
        monkeypatch.setattr(training, "free_resources", lambda: next(free))
        no_room = ray.train.ControllerError(WorkerGroupStartupTimeoutError(16))
        assert fit(*[no_room] * 3, {"outcome": {}}, workers={"min": 2, "max": 16}) == ({"outcome": {}}, 4)
        assert fit.sizes == [(2, 16), (2, 4), (2, 2), (2, 16)]
        assert [report["text"].rpartition(" ")[2] for report in fit.said] == ["4", "2", "16"]

    def test_a_group_that_had_trained_asks_for_all_again(self, fit, monkeypatch):
        # catches a lost node that no autoscaler is asked to replace
        newest = iter([None, "step-00000010-of-16-aa"])
        monkeypatch.setattr(training, "settle_checkpoints", lambda _folder: next(newest))
        no_room = ray.train.ControllerError(WorkerGroupStartupTimeoutError(16))
        assert fit(no_room, {"outcome": {}}, workers={"min": 2, "max": 16}) == ({"outcome": {}}, 2)
        assert fit.sizes == [(2, 16), (2, 16)]
        assert fit.said == []

    def test_a_controller_that_does_not_come_up_is_made_again(self, fit):
        # catches a run that ends since its storage was away while Ray Train looked at it
        assert fit(self.NOT_UP, ray.train.ControllerError(AWAY), {"outcome": {}}) == ({"outcome": {}}, 3)
        assert fit(self.NOT_UP, self.NOT_UP, self.NOT_UP, {}) == (self.NOT_UP, 3)

    def test_failures_with_a_checkpoint_between_them_are_not_of_one_kind(self, fit, monkeypatch):
        # catches a run of weeks that ends at its third storage failure in all
        newest = iter([None, None, "step-00000010-of-1-aa", "step-00000010-of-1-aa", "step-00000020-of-1-bb"])
        monkeypatch.setattr(training, "settle_checkpoints", lambda _folder: next(newest))
        failed = ray.train.ControllerError(AWAY)
        assert fit(failed, failed, self.NOT_UP, failed, {"outcome": {}}) == ({"outcome": {}}, 5)

    def test_a_controller_that_was_killed_is_not(self, fit):
        killed = ray.exceptions.ActorDiedError()
        assert fit(killed, {}) == (killed, 1)

    def test_a_storage_that_stays_away_is_found_before_the_next_one(self, fit, monkeypatch):
        # catches a command that waits for a quarter of an hour, and then ends with a screen of tracebacks
        clock = iter(range(0, 10_000, 20))
        monkeypatch.setattr(
            "shearing.patience.time", SimpleNamespace(sleep=lambda _s: None, monotonic=lambda: next(clock))
        )

        def away_for_good(handler):
            handler.faults = iter(lambda: AWAY, None)
            return ray.train.ControllerError(AWAY)

        error, groups = fit(away_for_good, {})
        assert type(error) is StorageError
        assert "Could not connect to server" in str(error)
        assert groups == 1

    def test_a_storage_that_fails_again_and_again_is_named(self, fit):
        # catches an end by a traceback of Ray Train's where one sentence would do
        error, groups = fit(*[ray.train.ControllerError(AWAY)] * 3)
        assert type(error) is StorageError
        assert "looking after the checkpoints failed" in str(error)
        assert groups == 3
