"""What is told of a run: finished, in the middle of a phase, hardly begun, or none at all."""

import json
import math
import os
import socket
import time

import pytest
from example_workspace import DOMAINS, PLAN, SOURCE_LOSS, START, write_example

from orchestrator.run_state import read_state, render_state
from orchestrator.workspace_lock import lock_workspace
from shearing.errors import UserError
from shearing.storage import open_store

NOW = START + 3600


@pytest.fixture
def half(tmp_path):
    """A run that was stopped in recovery, at step 120 of 400, after a resume at step 80."""
    store = write_example(tmp_path, leave_out=("scratch", "scores"))
    mark = store.read_json("stages/recovery.json")
    store.write_json("stages/recovery.json", mark | {"finished": None})
    rows = [json.loads(line) for line in store.read_bytes("metrics/recovery.jsonl").splitlines()]
    before = [row for row in rows if row["step"] <= 80 and row["kind"] != "event"]
    later = [row | {"time": row["time"] + 1000} for row in rows if 80 < row["step"] <= 120 and row["kind"] != "event"]
    resumed = {
        "kind": "event",
        "step": 80,
        "event": "resumed",
        "text": "goes on from step 80",
        "time": later[0]["time"],
    }
    start = {"kind": "start", "step": 80, "time": later[0]["time"], "workers": 3}
    checkpoint = {"kind": "checkpoint", "step": 80, "name": "step-00000080-of-3-ab", "seconds": 2.0, "time": NOW - 500}
    kept = [*before, checkpoint, resumed, start, *later]
    text = "".join(json.dumps(row) + "\n" for row in kept) + '{"kind": "step", "st'
    store.write_bytes("metrics/recovery.jsonl", text.encode())
    return store, later


def test_a_phase_in_the_middle(half):
    """Time left by a rate that counts hours of standing still; the source's losses shown as recovery's."""
    store, later = half
    state = read_state(store, NOW)
    assert not state["finished"]
    marks = {stage["stage"]: stage["state"] for stage in state["stages"]}
    assert marks == {
        "corpus": "finished", "source": "finished", "references": "finished", "pruning": "finished",
        "extraction": "finished", "recovery": "begun", "scratch": "to come", "scores": "to come", "report": "to come",
    }  # fmt: skip
    phase = state["phase"]
    assert (phase["phase"], phase["step"], phase["planned_steps"], phase["workers"]) == ("recovery", 120, 400, 3)
    assert math.isclose(phase["left_s"], (400 - 120) * 0.4, rel_tol=1e-6)
    assert phase["checkpoint"] == {"name": "step-00000080-of-3-ab", "step": 80, "age_s": 500}
    assert math.isclose(phase["last_row_age_s"], 500)
    shares = {"data_wait": 0.001, "forward_backward": 0.273, "communication": 0.078, "update": 0.038}
    assert phase["step_shares"] == pytest.approx({part: seconds / 0.39 for part, seconds in shares.items()})
    assert [event["event"] for event in phase["events"]] == ["resumed"]
    evaluation = [row for row in later if row["kind"] == "evaluation"][-1]
    assert set(phase["domains"]) == set(DOMAINS)
    for domain, figures in phase["domains"].items():
        assert figures["loss"] == evaluation["losses"][domain]
        assert figures["reference"] == SOURCE_LOSS[domain]
        assert math.isclose(figures["excess"], figures["loss"] - figures["reference"])
    text = render_state(state)
    for words in (
        "recovery: step 120/400 (30 %)",
        "1m 52s left",
        "on 3 workers",
        "goes on from step 80",
        "docstrings",
        "communication 20.0%",
    ):
        assert words in text
    assert json.loads(json.dumps(state)) == state


def test_a_phase_that_repeats_steps(half):
    """Catches a run at work shown where its dead workers had come to, with their loss, and as if it stood still."""
    store, later = half
    start = {"kind": "start", "step": 80, "time": NOW - 30, "workers": 2}
    again = [row | {"time": NOW - 20 + (row["step"] - 80), "loss": 9.0} for row in later[:1] if row["kind"] == "step"]
    again += [again[0] | {"step": again[0]["step"] + 1, "time": again[0]["time"] + 1}]
    rows = store.read_bytes("metrics/recovery.jsonl") + b"\n"
    store.write_bytes("metrics/recovery.jsonl", rows + json.dumps(start).encode())
    phase = read_state(store, NOW)["phase"]
    assert (phase["phase"], phase["step"], phase["workers"], phase["last_row_age_s"]) == ("recovery", 80, 2, 30)
    assert phase["checkpoint"]["step"] == 80
    store.write_bytes(
        "metrics/recovery.jsonl", rows + b"".join(json.dumps(row).encode() + b"\n" for row in [start, *again])
    )
    phase = read_state(store, NOW)["phase"]
    assert (phase["step"], phase["loss"]) == (again[-1]["step"], 9.0)
    assert phase["last_row_age_s"] == NOW - again[-1]["time"]
    assert phase["left_s"] == 400 - again[-1]["step"]


def test_mask_learning_tells_its_gates(tmp_path):
    store = write_example(tmp_path, leave_out=("extraction", "recovery", "scratch", "scores"))
    store.write_json("stages/pruning.json", store.read_json("stages/pruning.json") | {"finished": None})
    state = read_state(store, NOW)
    assert state["phase"]["phase"] == "pruning"
    assert set(state["phase"]["sparsity"]) == {"layer", "hidden", "head", "intermediate"}
    assert "widest gap" in render_state(state)
    assert state["phase"]["checkpoint"] is None
    assert "no checkpoint is known of" in render_state(state)


def test_steps_that_were_not_split(tmp_path):
    """A log of an earlier release that cannot be read any more, or of which shares are told that nobody measured."""
    store = write_example(tmp_path, leave_out=("pruning", "extraction", "recovery", "scratch", "scores"))
    state = read_state(store, NOW)
    assert state["phase"]["phase"] == "source"
    assert state["phase"]["step_shares"] == {}
    assert "time of steps" not in render_state(state)


def test_a_finished_run_has_nothing_left(tmp_path):
    """A follower that never ends; time left of a phase that is over."""
    store = write_example(tmp_path)
    store.write_json("stages/report.json", store.read_json("stages/scores.json") | {"stage": "report"})
    state = read_state(store, NOW)
    assert state["finished"]
    assert state["phase"]["left_s"] is None
    assert state["phase"]["step"] == PLAN[state["phase"]["phase"]][0]


def test_a_run_before_its_first_phase(tmp_path):
    store = open_store(str(tmp_path))
    store.write_bytes("recipe.yaml", b"name: young\ncorpus: {domains: {a: {}}}\n")
    store.write_json("stages.json", ["corpus", "source"])
    state = read_state(store, NOW)
    assert state["phase"] is None
    assert {stage["state"] for stage in state["stages"]} == {"to come"}
    assert "scratch" not in render_state(state), "the run does without it"


def test_a_run_of_fewer_stages_comes_to_its_end(tmp_path):
    """A follower that waits for ever: for the scores of a comparison's method, or for stages of another method."""
    store = write_example(tmp_path, leave_out=("scratch", "scores"))
    assert not read_state(store, NOW)["finished"]
    asked = ["corpus", "source", "references", "pruning", "extraction", "recovery"]
    store.write_json("stages.json", asked)
    state = read_state(store, NOW)
    assert [stage["stage"] for stage in state["stages"]] == asked
    assert state["finished"]


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match="holds no recipe"):
        read_state(open_store(str(tmp_path)), NOW)


def test_the_driver_is_found_alive_and_gone(tmp_path):
    """A lock file outlives its driver, and its number may be somebody else's by then."""
    store = write_example(tmp_path)
    assert read_state(store, NOW)["driver"] == "none"
    with lock_workspace(store, [].append):
        assert read_state(store, NOW)["driver"] == f"process {os.getpid()} on {socket.gethostname()}, at work"
    holder = json.loads(store.read_bytes("driver.lock")) | {"time": time.time() - 10**8}
    store.write_bytes("driver.lock", json.dumps(holder).encode())
    assert read_state(store, NOW)["driver"].endswith("gone")
    # a container may have its host's name, and numbers of its own
    for elsewhere in ({"host": "elsewhere"}, {"processes": "pid:[1]"}):
        store.write_bytes("driver.lock", json.dumps(holder | elsewhere).encode())
        assert "cannot be looked into" in read_state(store, NOW)["driver"]
