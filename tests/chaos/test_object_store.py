"""Whole runs on an object store that fails: short outages are waited out, after a long one the same command goes on.

Also what else ends a run there: SIGTERM, and an outage that outlasts the command.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky_proxy import Outage
from journeys import (
    ROOT,
    SCRIPT,
    Journey,
    check_data_account,
    end_with_children,
    environment,
    largest_loss_difference,
    newest_step,
    small_journey,
    wait_until,
)
from outages import KEYS, KINDS, MOMENTS, ObjectStore, drawn, object_store

SEED = 1
STEPS, BATCH_SEQUENCES = 28, 8
PHASES = ("pruning", "recovery")
OFTEN = [f"{phase}.{key}" for phase in PHASES for key in (f"steps={STEPS}", "checkpoint_every_steps=4")]
ROUNDING = 1e-5  # nats a token, as in tests/test_faults.py
LONG = Outage(99, "refuse", MOMENTS["checkpoint of continued pretraining"], seconds=130.0)
ENDLESS = Outage(98, "busy", MOMENTS["checkpoint of continued pretraining"], seconds=1e6)
OVER = Outage(97, "busy", begins="never")


@pytest.fixture
def store(tmp_path, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store(tmp_path / "store") as started:
        yield started


def test_every_kind_and_moment_has_its_turn():
    """Catches a failure that nobody can bring about again, and a kind or a moment that is never struck with."""
    outages = drawn(SEED)
    assert outages == drawn(SEED)
    assert [what for what, _ in outages] == list(MOMENTS)
    assert {outage.kind for _, outage in outages} == set(KINDS)


@contextlib.contextmanager
def command(journey: Journey, folder: Path) -> Iterator[subprocess.Popen]:
    """The real command, its output in a file."""
    with (folder / "console.txt").open("a") as out:
        run = subprocess.Popen(
            [sys.executable, str(SCRIPT), *journey.arguments],
            stdout=out, stderr=out, cwd=ROOT, env=environment(), start_new_session=True,
        )  # fmt: skip
    try:
        yield run
    finally:
        end_with_children(run)


def kept(store: ObjectStore, folder: Path) -> Journey:
    """The workspace as it lies in the bucket, copied here."""
    folder.mkdir()
    store.store("run").download(folder)
    return Journey(folder, [])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_on_an_object_store_that_fails(store, tmp_path):
    """Catches a request that is not made again, one that is made twice with another effect, and rows that are lost."""
    words = [f"workspace={store.uri('run')}", f"corpus.path={store.uri('corpora')}", "engine.max_failures=0"]
    journey = small_journey(tmp_path / "harmed", shared=tmp_path).with_overrides(*OFTEN, *words)
    with command(journey, tmp_path) as run:
        for what, outage in drawn(SEED):
            strike(store, outage, run)
            assert run.poll() is None, f"ended at {what}: {console(tmp_path)}"
        store.arm(LONG)  # too long for the workers' patience; a new group may be in time for its end, or not
        status = run.wait(timeout=900)
    said = console(tmp_path)
    assert store.begun(LONG.number), "the long outage found nothing to strike at"
    assert "Traceback" not in said, said
    if status != 0:
        assert status == 1, said
        assert "run the same again" in said, said
        wait_until(lambda: over(store, LONG), "the store is back", every_s=0.5)
        with command(journey, tmp_path) as run:
            assert run.wait(timeout=1200) == 0, console(tmp_path)
    harmed = kept(store, tmp_path / "at the end")
    tell(store, harmed)
    starts = {phase: sum(row["kind"] == "start" for row in harmed.rows(phase)) for phase in PHASES}
    assert starts["pruning"] == 1, "a worker was started again for a short outage"
    assert starts["recovery"] <= 2, starts
    check_like_the_unharmed(harmed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_on_an_object_store_that_is_stopped_and_goes_on(store, tmp_path):
    """Catches a second driver that is let in, a notice that saves nothing, and a command that waits for ever for a
    store which stays away, or after which the same command does not go on."""
    words = [f"workspace={store.uri('run')}", f"corpus.path={store.uri('corpora')}", "engine.max_failures=0"]
    journey = small_journey(tmp_path / "harmed", shared=tmp_path).with_overrides(*OFTEN, *words)
    marks = store.store("run")

    def step_of(phase: str) -> int:
        rows = marks.read_bytes(f"metrics/{phase}.jsonl") if marks.exists(f"metrics/{phase}.jsonl") else b""
        return max((row["step"] for row in map(json.loads, rows.splitlines()) if row["kind"] == "step"), default=0)

    with command(journey, tmp_path) as run:
        wait_until(lambda: run.poll() is not None or step_of("pruning") >= 5, "step 5", timeout_s=600, every_s=0.2)
        assert run.poll() is None, console(tmp_path)
        second = journey.run(timeout_s=120)
        assert second.returncode == 2, second.stderr
        assert "another driver is at work" in second.stderr, second.stderr
        assert "Traceback" not in second.stderr, second.stderr
        assert run.poll() is None, console(tmp_path)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=300) == 128 + signal.SIGTERM, console(tmp_path)
    assert "run the same again" in console(tmp_path), console(tmp_path)
    stopped = kept(store, tmp_path / "stopped")
    saved = newest_step(stopped, "pruning")
    assert 0 < saved < STEPS
    assert stopped.checkpoints("pruning")[-1].name.startswith(f"step-{saved:08d}-of-2-")

    store.arm(ENDLESS)
    began_s = time.time()
    with command(journey, tmp_path) as run:
        status = run.wait(timeout=1500)
    said = console(tmp_path)
    assert store.begun(ENDLESS.number) > began_s, f"the outage found nothing to strike at: {said}"
    assert status == 1, said
    assert "Traceback" not in said, said
    assert "run the same again" in said, said
    ended_s = time.time() - store.begun(ENDLESS.number)
    store.arm(OVER)
    with command(journey, tmp_path) as run:
        assert run.wait(timeout=1200) == 0, console(tmp_path)

    harmed = kept(store, tmp_path / "at the end")
    starts = [row["step"] for row in harmed.rows("pruning") if row["kind"] == "start"]
    assert starts == [0, saved], "steps that the notice had saved were done again"
    check_like_the_unharmed(harmed, tmp_path)
    sys.stdout.write(f"status 1 came {ended_s:.0f} s after the store was gone\n")


def check_like_the_unharmed(harmed: Journey, folder: Path) -> None:
    """Every sequence once in both phases, and the losses of a run on a local disk that nothing befell."""
    for phase in PHASES:
        check_data_account(harmed.rows(phase), STEPS, BATCH_SEQUENCES, harmed.checkpoints(phase)[-1])
    unharmed = small_journey(folder / "unharmed", shared=folder).with_overrides(*OFTEN)
    done = unharmed.run(timeout_s=1200)
    assert done.returncode == 0, done.stderr
    differences = {phase: largest_loss_difference(harmed.rows(phase), unharmed.rows(phase)) for phase in PHASES}
    assert max(differences.values()) < ROUNDING, differences


def strike(store: ObjectStore, outage: Outage, run: subprocess.Popen) -> None:
    """Let an outage begin at its moment, and come to its end."""
    store.arm(outage)
    wait_until(
        lambda: run.poll() is not None or over(store, outage),
        f"{outage} begins and ends",
        timeout_s=600,
        every_s=0.2,
    )


def over(store: ObjectStore, outage: Outage) -> bool:
    return 0 < store.begun(outage.number) < time.time() - outage.seconds


def tell(store: ObjectStore, run: Journey) -> None:
    """Print what each outage came to: requests struck, and seconds until the next step."""
    log = store.log()
    for what, outage in [*drawn(SEED), ("long", LONG)]:
        begun_s = store.begun(outage.number)
        struck = sum(begun_s <= row["time"] <= begun_s + outage.seconds for row in log if row.get("struck"))
        after = [row["time"] for phase in PHASES for row in run.rows(phase) if row["kind"] == "step"]
        back_s = min((time_s - begun_s for time_s in after if time_s > begun_s), default=None)
        told = {"moment": what, "kind": outage.kind, "seconds": outage.seconds, "struck": struck, "next_step_s": back_s}
        sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.write(json.dumps(store.requests()) + "\n")
    sys.stdout.flush()


def console(folder: Path) -> str:
    return (folder / "console.txt").read_text()
