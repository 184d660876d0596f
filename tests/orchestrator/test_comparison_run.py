"""How a comparison stops; whole comparisons are in tests/test_comparison.py."""

import io
import os
import signal
import threading
import time

import pytest
import ray
from recipes_for_tests import tiny_recipe

from actors import training
from actors.run_log import RunLog
from orchestrator import comparison_run
from orchestrator.comparison_run import MethodRun
from orchestrator.console import Console
from orchestrator.ray_session import SurroundingSession
from orchestrator.stage import Context
from orchestrator.workspace import open_workspace


def test_a_stopped_comparison_lets_every_driver_save_a_checkpoint(ray_session, tmp_path, monkeypatch):
    """Catches drivers that Ray kills with the comparison: all since their last checkpoint is lost, as by a crash."""
    recipe = tiny_recipe(tmp_path, "comparison.at_once=2")
    wait_for_phase = training._in_thread

    def drive(run, _verbose):  # waits as a phase does, and leaves a file where a phase leaves a checkpoint
        asked = threading.Event()

        def workers():
            (tmp_path / f"{run.name}-begun").touch()
            asked.wait(timeout=60)
            time.sleep(1)
            (tmp_path / f"{run.name}-saved").touch()
            return {}

        log = ray.remote(num_cpus=0)(RunLog).remote(str(tmp_path / run.name), "recovery")
        ray.get(log.newer.remote(0))  # it stands before a phase begins

        def leave():
            ray.get(log.ask_to_leave.remote())
            asked.set()

        return wait_for_phase(workers, leave)

    def interrupt():
        while len(list(tmp_path.glob("*-begun"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(comparison_run, "drive", drive)
    context = Context(recipe, open_workspace(recipe), Console(io.StringIO()), SurroundingSession(recipe))
    context.session.is_embedded = True
    runs = [MethodRun(name, recipe.model_copy(update={"workspace": f"{tmp_path}/{name}"})) for name in ("l2", "random")]
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        comparison_run._drive_all(runs, context)
    assert sorted(path.name for path in tmp_path.glob("*-saved")) == ["l2-saved", "random-saved"]
