import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from failing_storage import AWAY, failing_store
from journeys import wait_until
from recipes_for_tests import tiny_recipe

from orchestrator import workspace_lock
from orchestrator.recipe_loading import load_recipe
from orchestrator.workspace import Workspace, fingerprint, open_workspace, workspace_uri
from orchestrator.workspace_lock import STAMP_NAME, lock_workspace
from shearing.errors import UserError
from shearing.storage import open_store

HOLD = """
import sys
from orchestrator.workspace_lock import lock_workspace
from shearing.storage import open_store
with lock_workspace(open_store(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def workspace(tmp_path):
    return Workspace(open_store(str(tmp_path / "run")))


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_mark_goes_from_begun_to_finished(workspace):
    assert workspace.mark("corpus") is None
    begun = workspace.begin("corpus", {"recipe": {"a": 1}, "stages": {}})
    assert workspace.mark("corpus").finished is None
    workspace.interrupted(begun, 3.0)
    again = workspace.begin("corpus", {"recipe": {"a": 1}, "stages": {}})
    done = workspace.finish(again, {"path": "x"}, 2.0)
    assert workspace.mark("corpus") == done
    assert done.started == begun.started
    assert done.seconds == 5.0  # all attempts
    assert done.outputs == {"path": "x"}
    assert list(workspace.marks()) == ["corpus"]


def test_a_mark_on_other_inputs_starts_afresh(workspace):
    first = workspace.begin("corpus", {"recipe": {"a": 1}, "stages": {}})
    workspace.interrupted(first, 3.0)
    second = workspace.begin("corpus", {"recipe": {"a": 2}, "stages": {}})
    assert second.inputs != first.inputs
    assert second.seconds is None


def test_a_fingerprint_knows_values_and_not_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


def test_the_recipe_recorded_is_the_recipe(tmp_path):
    recipe = tiny_recipe(tmp_path)
    workspace = open_workspace(recipe)
    workspace.record(recipe, ["corpus", "source"])
    assert load_recipe(workspace.store.locate("recipe.yaml"), []) == recipe
    assert workspace.store.read_json("stages.json") == ["corpus", "source"]
    assert workspace.begin("corpus", {}).versions["ray"][0].isdigit()


def test_a_run_lies_under_runs_unless_told(tmp_path):
    recipe = tiny_recipe(tmp_path, "workspace=null")
    assert workspace_uri(recipe) == "runs/tiny"


def test_a_second_driver_is_kept_out(workspace):
    """Two drivers in one workspace write one another's checkpoints over."""
    other = hold(workspace.store.path)
    try:
        with pytest.raises(UserError, match=f"process {other.pid} on "), lock_workspace(workspace.store, [].append):
            pass
    finally:
        other.communicate("")
    with lock_workspace(workspace.store, [].append):
        pass


def test_a_killed_driver_leaves_no_lock(workspace):
    """A lock file that outlives kill -9 makes every resume a manual repair."""
    other = hold(workspace.store.path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock_workspace(workspace.store, [].append):
        pass


def test_a_remote_workspace_holds_a_stamp_while_it_is_in_use():
    store = open_store("memory://bucket/locked")
    with lock_workspace(store, [].append):
        assert store.exists(STAMP_NAME)
        with pytest.raises(UserError, match="another driver is at work"), lock_workspace(store, [].append):
            pass
    assert not store.exists(STAMP_NAME)


def test_an_old_remote_stamp_is_a_dead_driver():
    store = open_store("memory://bucket/stale")
    store.write_json(STAMP_NAME, {"host": "elsewhere", "pid": 1, "time": 0})
    with lock_workspace(store, [].append):
        assert store.read_json(STAMP_NAME)["host"] != "elsewhere"


def test_a_file_system_without_locks_is_no_other_driver(workspace, monkeypatch):
    """Hours spent looking for a second driver, where the folder's file system has no locks at all."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be locked .ENOLCK: No locks"), lock_workspace(workspace.store, print):
        pass


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workspace_lock, "STAMP_DEAD_AFTER_S", 1.5)
    monkeypatch.setattr(workspace_lock, "STAMP_POLL_S", 0.05)
    monkeypatch.setattr(workspace_lock, "STAMP_EVERY_S", 0.05)


def test_a_driver_started_again_elsewhere_waits_for_the_dead_ones_stamp(hasty):
    """A restarted pod that ends with status 2 within seconds, and spends the job's retries on that."""
    store, said = open_store("memory://bucket/restarted"), []
    began = time.time()
    store.write_json(STAMP_NAME, {"host": "elsewhere", "pid": 1, "time": began})
    with lock_workspace(store, said.append):
        assert time.time() >= began + 1.5 - 0.1
        assert store.read_json(STAMP_NAME)["pid"] == os.getpid()
    assert "process 1 on elsewhere held memory://bucket/restarted 0 s ago; waiting" in said[0]


def test_a_stamp_that_is_renewed_belongs_to_a_driver_at_work(hasty):
    store = open_store("memory://bucket/renewed")
    store.write_json(STAMP_NAME, {"host": "elsewhere", "pid": 1, "time": time.time()})
    renewed = {"host": "elsewhere", "pid": 1, "time": time.time() + 1}
    with (
        pytest.raises(UserError, match="another driver is at work"),
        lock_workspace(store, lambda _: store.write_json(STAMP_NAME, renewed)),
    ):
        pass
    assert store.read_json(STAMP_NAME) == renewed


def test_a_process_number_given_anew_is_another_process():
    """A driver that waits for its own number, which the dead one had before a new start of the machine."""
    store = open_store("memory://bucket/reused")
    before = psutil.Process().create_time() - 1
    store.write_json(STAMP_NAME, workspace_lock._self() | {"time": before})
    with lock_workspace(store, pytest.fail):
        assert store.read_json(STAMP_NAME)["time"] > before


def test_a_process_of_another_container_is_not_looked_for(hasty):
    """Two drivers at once, one in a container that shares its host's name and one beside it."""
    store, said = open_store("memory://bucket/container"), []
    store.write_json(STAMP_NAME, workspace_lock._self() | {"processes": "pid:[1]", "pid": 2**22 + 1})
    with lock_workspace(store, said.append):
        pass
    assert "waiting for up to" in said[0]


def test_a_stamp_that_was_taken_over_is_left_alone(hasty):
    """A driver that was frozen for minutes: its stamp written over that of its successor, and removed at its end."""
    store, said = open_store("memory://bucket/frozen"), []
    other = {"host": "elsewhere", "pid": 1, "time": time.time(), "driver": "b"}
    with lock_workspace(store, said.append):
        while store.read_json(STAMP_NAME) != other:
            store.write_json(STAMP_NAME, other)  # the renewing thread may just have looked
            time.sleep(0.2)
        assert store.read_json(STAMP_NAME) == other
    assert store.read_json(STAMP_NAME) == other
    assert said == [
        "another driver took memory://bucket/frozen over while this one was not heard of; stop one of the two"
    ]


def test_a_stamp_is_renewed_soon_after_an_outage(hasty, monkeypatch, tmp_path):
    """Catches a driver that lives, and is taken for dead by the next one after its storage was away for a while."""
    monkeypatch.setattr(workspace_lock, "STAMP_EVERY_S", 0.3)
    store, handler = failing_store(tmp_path)
    with lock_workspace(store, pytest.fail):
        before = store.read_json(STAMP_NAME)["time"]
        handler.faults = itertools.repeat(AWAY)
        wait_until(lambda calls=handler.calls: handler.calls > calls + 2, "several tries in an outage", every_s=0.01)
        handler.faults = iter(())
        assert wait_until(lambda: store.read_json(STAMP_NAME)["time"] > before, "a new stamp", timeout_s=5)
    assert not store.exists(STAMP_NAME)


def test_a_driver_that_ends_in_an_outage_ends_soon(hasty, tmp_path):
    """Catches a stop that waits for a storage, to remove a stamp that grows old by itself."""
    store, handler = failing_store(tmp_path)
    began_s = time.monotonic()
    with lock_workspace(store, pytest.fail):
        handler.faults = itertools.repeat(AWAY)
    assert time.monotonic() < began_s + 5
