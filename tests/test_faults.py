"""Real kills in real runs: at most the steps since the last checkpoint are repeated, and nothing else differs."""

import itertools
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from journeys import (
    SCRIPT,
    Journey,
    check_data_account,
    end_with_children,
    largest_loss_difference,
    newest_step,
    ray_processes,
    small_journey,
    wait_until,
)

from actors import training
from actors.checkpoints import SNAPSHOT_NAME, drop_torn_checkpoints, newest_checkpoint, settle_checkpoints
from actors.training import run_phase
from shearing.data.config import MixtureConfig
from shearing.errors import UserError
from shearing.storage import open_store
from shearing.training.phase import PhaseConfig

STEPS, BATCH_SEQUENCES, CHECKPOINT_EVERY = 24, 8, 8
ROUNDING = 1e-5  # nats a token, between runs that do the same sums in the same order
REARRANGED = 2e-3  # the same after sums over another number of workers
GONE_WITHIN_S = 30
AGENTS = (
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
)  # Ray's own, which try for 60 s to tell a dead node of its death
AGENTS_GONE_WITHIN_S = 120


class Killer:
    """SIGKILLs one of Ray's processes below this one, once the metrics have come to a step."""

    def __init__(self, journey: Journey, kills: dict[int, str]) -> None:
        self.journey, self.kills = journey, kills
        self.killed: list[str] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._kill, daemon=True)

    def __enter__(self) -> "Killer":
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        self.thread.join(timeout=10)

    def _kill(self) -> None:
        for step, title in sorted(self.kills.items()):
            while not self.over.is_set() and not (newest_step(self.journey, "pruning") >= step):
                time.sleep(0.01)
            found = [] if self.over.is_set() else ray_processes(os.getpid(), title)
            if found:
                found[-1].send_signal(signal.SIGKILL)
                self.killed.append(title)


def saved_step(journey: Journey, phase: str) -> int:
    """The step of the newest checkpoint."""
    return int(journey.checkpoints(phase)[-1].name.split("-")[1])


def resumed_at(journey: Journey, phase: str) -> list[int]:
    return [row["step"] for row in journey.rows(phase) if row["kind"] == "event" and row["event"] == "resumed"]


def check_resumed(journey: Journey, phase: str, times: int, asked: Container[int] = ()) -> None:
    """So many starts from a checkpoint. Which one it was depends on how far the workers came while a signal flew.

    One that was asked to stop may have left a checkpoint at any step.
    """
    starts = resumed_at(journey, phase)
    assert len(starts) == times, starts
    assert all(step > 0 and (step % CHECKPOINT_EVERY == 0 or step in asked) for step in starts)
    assert starts == sorted(starts)


def check_whole(journey: Journey, phase: str, expected: Journey, tolerance: float = ROUNDING) -> None:
    """A phase that was interrupted came to what the uninterrupted one came to, and repeated little."""
    rows = journey.rows(phase)
    check_data_account(rows, STEPS, BATCH_SEQUENCES, journey.checkpoints(phase)[-1])
    assert largest_loss_difference(rows, expected.rows(phase)) < tolerance
    written = [row["step"] for row in rows if row["kind"] == "step"]
    repeated = [before - step + 1 for before, step in itertools.pairwise(written) if step <= before]
    assert all(steps <= CHECKPOINT_EVERY for steps in repeated), "more than a checkpoint's steps were repeated"


def run_with_kills(phase: PhaseConfig, folder: Path, kills: dict[int, str]) -> Journey:
    journey = Journey(folder, [])
    with Killer(journey, kills) as killer:
        run_phase(phase, str(folder), lambda _report: None)
    assert killer.killed == [title for _, title in sorted(kills.items())], "the phase ended before the kill"
    return journey


def test_killed_feeder_and_domain_weights_cost_nothing(ray_session, finished_journey, pruning_phase, tmp_path):
    """Catches state that only an actor holds: a draw or a decision that dies with it."""
    journey = run_with_kills(pruning_phase, tmp_path / "run", {6: "SequenceFeeder", 14: "DomainWeights"})
    assert resumed_at(journey, "pruning") == [], "the workers themselves had to begin again"
    check_whole(journey, "pruning", finished_journey[0])


def test_killed_worker_goes_on_from_the_checkpoint(ray_session, finished_journey, pruning_phase, tmp_path):
    """Catches gates, moments, random state, credit or proportions that a checkpoint leaves out."""
    journey = run_with_kills(pruning_phase, tmp_path / "run", {11: "RayTrainWorker"})
    check_resumed(journey, "pruning", 1)
    check_whole(journey, "pruning", finished_journey[0])

    # The phase is done. A driver that dies before it says so, with Ray Train's snapshot half written, begins it again:
    snapshot = journey.workspace / "checkpoints/pruning" / SNAPSHOT_NAME
    snapshot.write_bytes(snapshot.read_bytes()[:50])
    before = journey.rows("pruning")
    result = run_phase(pruning_phase, str(journey.workspace), lambda _report: None)
    assert result.checkpoint == str(journey.checkpoints("pruning")[-1])
    assert set(result.outcome) >= {"converged", "gaps", "missed"}
    after = journey.rows("pruning")[len(before) :]
    assert [(row["kind"], row.get("event")) for row in after] == [("event", "resumed"), ("start", None)]


def test_what_a_user_has_to_mend_is_not_tried_again(ray_session, pruning_phase, tmp_path):
    """Catches three more starts of all workers, and a traceback, for a domain that simply ran out."""
    stopping = pruning_phase.model_copy(update={"mixture": MixtureConfig(on_exhausted="stop")})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="tables") as caught:
        run_phase(stopping, str(tmp_path / "run"), lambda _report: None)
    assert len(caught.value.problems) == 1
    journey = Journey(tmp_path / "run", [])
    assert resumed_at(journey, "pruning") == []
    steps = [row["step"] for row in journey.rows("pruning") if row["kind"] == "step"]
    assert steps == sorted(set(steps))
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C is no longer the driver's"


def test_a_phase_that_waits_for_nodes_stops_at_once(ray_session, recovery_phase, tmp_path, monkeypatch):
    """Catches ten minutes of waiting for a checkpoint that nobody is there to save, longer than any grace time."""
    waiting, over, said = threading.Event(), threading.Event(), []

    def wait_for_nodes(*_):
        waiting.set()
        over.wait(timeout=60)

    def interrupt():
        waiting.wait(timeout=60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "_fit_group", wait_for_nodes)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_phase(recovery_phase, str(tmp_path / "run"), lambda report: said.append(report["text"]))
    assert not over.is_set()
    over.set()
    assert said == ["no workers train yet, so there is nothing to save"]


def test_only_whole_checkpoints_are_gone_on_from(finished_journey, tmp_path):
    """Catches a half-written checkpoint taken for one, a whole one that is missed, and orphans that fill the disk."""
    journey, _ = finished_journey
    phase = tmp_path / "pruning"
    shutil.copytree(journey.workspace / "checkpoints/pruning", phase)
    older, newest = sorted(phase.glob("step-*"))
    store = open_store(str(phase))
    assert newest_checkpoint(store) == open_store(str(newest))
    assert settle_checkpoints(store) == newest.name
    assert (phase / SNAPSHOT_NAME).exists()
    assert older.exists()

    unlisted = phase / newest.name.replace("step-00000024", "step-00000032")
    shutil.copytree(newest, unlisted)
    cut_off = phase / newest.name.replace("step-00000024", "step-00000040")
    shutil.copytree(newest, cut_off)
    weights = next(cut_off.glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert newest_checkpoint(store) == open_store(str(unlisted))
    half = phase / newest.name.replace("step-00000024", "step-00000048")
    shutil.copytree(newest, half, ignore=shutil.ignore_patterns("index.json"))
    drop_torn_checkpoints(store)
    assert {path.name for path in phase.glob("step-*")} == {older.name, newest.name, unlisted.name}
    assert (phase / SNAPSHOT_NAME).exists()
    shutil.copytree(newest, cut_off)
    next(cut_off.glob("weights-*")).unlink()
    assert settle_checkpoints(store) == unlisted.name
    assert not cut_off.exists()
    assert (phase / SNAPSHOT_NAME).exists()

    (unlisted / "index.json").write_text('{"format_ver')
    next(newest.glob("weights-*")).unlink()
    assert newest_checkpoint(store) == open_store(str(older))
    assert settle_checkpoints(store) == older.name
    assert [path.name for path in phase.glob("step-*")] == [older.name]
    assert not (phase / SNAPSHOT_NAME).exists(), "it names a checkpoint that is gone"
    assert settle_checkpoints(open_store(str(tmp_path / "nowhere"))) is None
    assert newest_checkpoint(open_store(str(tmp_path / "nowhere"))) is None


def ready_journey(finished: Journey, folder: Path) -> Journey:
    """A run whose driver ended before mask learning: the marks and models of a finished run up to there."""
    journey = small_journey(folder, shared=finished.workspace.parents[1])
    (journey.workspace / "stages").mkdir(parents=True)
    for stage in ("corpus", "source", "references"):
        shutil.copy(finished.workspace / "stages" / f"{stage}.json", journey.workspace / "stages")
    return journey


@dataclass
class Stop:
    """How a command ended that got a signal, and Ray's agents that were left at that moment."""

    status: int
    words: str
    agents: list[psutil.Process]


def interrupt(journey: Journey, phase: str, step: int, number: signal.Signals) -> Stop:
    """Start the command, send its driver a signal at a step, and see that none of its processes works on."""
    before = len(journey.rows(phase))  # the workers of a killed driver may have come further than it was killed for
    process = journey.start()
    try:
        wait_until(
            lambda: newest_step(journey, phase, before) >= step or process.poll() is not None, f"step {step} of {phase}"
        )
        assert process.poll() is None, process.communicate()[1]
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in below)
        agents = [child for child in below if child.name().startswith(tuple(name[:15] for name in AGENTS))]
        process.send_signal(number)
        _, words = process.communicate(timeout=60)
        _, left = psutil.wait_procs([child for child in below if child not in agents], timeout=GONE_WITHIN_S)
        assert left == [], "processes were left behind"
    finally:
        end_with_children(process)
    return Stop(process.returncode, words, agents)


def check_agents_gone(*stops: Stop) -> None:
    _, left = psutil.wait_procs([agent for stop in stops for agent in stop.agents], timeout=AGENTS_GONE_WITHIN_S)
    assert left == [], "processes were left behind"


def check_stopped(journey: Journey, stop: Stop, number: signal.Signals) -> None:
    words = stop.words
    assert stop.status == 128 + number
    assert f"stopped by {number.name}" in words
    assert shlex.join(["python", str(SCRIPT), *journey.arguments]) in words
    assert "Traceback" not in words


def test_killed_and_stopped_driver_goes_on_by_the_same_command(finished_journey, tmp_path):
    """Catches what lives in the driver alone, a lock or process that outlives it, and a stop that reads as a crash."""
    finished, _ = finished_journey
    journey = ready_journey(finished, tmp_path / "again")
    killed = interrupt(journey, "pruning", 11, signal.SIGKILL)
    assert killed.status == -signal.SIGKILL
    stopped = interrupt(journey, "recovery", 11, signal.SIGTERM)
    assert "finished already" in stopped.words
    assert "goes on from step" in stopped.words
    check_stopped(journey, stopped, signal.SIGTERM)
    assert "saving a checkpoint first" in stopped.words
    assert saved_step(journey, "recovery") >= 11, "what was done since the last regular checkpoint is lost"
    check_resumed(journey, "pruning", 1)
    check_whole(journey, "pruning", finished)
    check_agents_gone(killed, stopped)


@pytest.mark.slow
def test_killed_driver_in_every_phase_and_with_other_workers(finished_journey, tmp_path):
    """The longest way: killed in both phases, stopped by Ctrl-C, and gone on with each time by other workers."""
    finished, _ = finished_journey
    journey = ready_journey(finished, tmp_path / "again")
    one, two, four = (journey.with_overrides(f"engine.workers={count}") for count in (1, 2, 4))
    first = interrupt(two, "pruning", 11, signal.SIGKILL)
    second = interrupt(one, "pruning", 19, signal.SIGINT)
    check_stopped(one, second, signal.SIGINT)
    third = interrupt(two, "recovery", 3, signal.SIGKILL)
    fourth = interrupt(two, "recovery", 13, signal.SIGKILL)
    assert {stop.status for stop in (first, third, fourth)} == {-signal.SIGKILL}
    done = four.run()
    assert done.returncode == 0, done.stderr
    check_resumed(journey, "pruning", 2, asked=range(19, STEPS))
    check_resumed(journey, "recovery", 1)
    for phase in ("pruning", "recovery"):
        check_whole(journey, phase, finished, REARRANGED)
    assert journey.json("stages/extraction.json")["outputs"]["agrees"]
    check_agents_gone(first, second, third, fourth)


@pytest.mark.slow
def test_killed_actors_and_worker_in_continued_pretraining(finished_journey, tmp_path):
    """Each of the run's processes, killed in a run of the real command that nobody starts again."""
    finished, _ = finished_journey
    journey = ready_journey(finished, tmp_path / "again")
    process = journey.start()
    try:
        for step, title in ((5, "SequenceFeeder"), (10, "DomainWeights"), (19, "RayTrainWorker")):
            wait_until(lambda: newest_step(journey, "recovery") >= step or process.poll() is not None, title)  # noqa: B023
            assert process.poll() is None, process.communicate()[1]
            ray_processes(process.pid, title)[0].send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    finally:
        end_with_children(process)
    assert process.returncode == 0, err
    check_resumed(journey, "recovery", 1)
    check_whole(journey, "recovery", finished)
