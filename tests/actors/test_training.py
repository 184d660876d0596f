"""How a phase ends when its driver is asked to stop; whole phases are in tests/test_faults.py."""

import os
import signal
import threading
import time

import pytest
import ray

from actors import training
from actors.run_log import RunLog


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

    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        training._in_thread(work, asked.set)
    assert saved.is_set()


def test_workers_that_never_leave_are_left_behind(monkeypatch):
    monkeypatch.setattr(training, "LEAVE_WITHIN_S", 0.2)
    over = threading.Event()
    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        training._in_thread(lambda: {"late": over.wait(timeout=30)}, lambda: None)
    over.set()


def test_what_the_phase_returns_or_raises_comes_back():
    assert training._in_thread(lambda: {"checkpoint": "last"}, lambda: None) == {"checkpoint": "last"}
    with pytest.raises(RuntimeError, match="as it was"):
        training._in_thread(lambda: (_ for _ in ()).throw(RuntimeError("as it was")), lambda: None)


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
