"""Whole runs on an object store that fails: short outages are waited out, after a long one the same command goes on."""

import contextlib
import json
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
NOTHING = Outage(100, "slow")


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
        store.arm(LONG)
        assert run.wait(timeout=900) == 1, console(tmp_path)
    assert store.begun(LONG.number), "the long outage found nothing to strike at"
    said = console(tmp_path)
    assert "Traceback" not in said, said
    assert "writing the checkpoint" in said, said
    assert "run the same again" in said, said
    wait_until(lambda: over(store, LONG), "the store is back", every_s=0.5)
    store.arm(NOTHING)
    harmed = kept(store, tmp_path / "after the outage")
    for phase in PHASES:  # no worker was started again for a short outage
        assert sum(row["kind"] == "start" for row in harmed.rows(phase)) == 1
    with command(journey, tmp_path) as run:
        assert run.wait(timeout=1200) == 0, console(tmp_path)
    harmed = kept(store, tmp_path / "at the end")
    tell(store, harmed)
    for phase in PHASES:
        check_data_account(harmed.rows(phase), STEPS, BATCH_SEQUENCES, harmed.checkpoints(phase)[-1])
    unharmed = small_journey(tmp_path / "unharmed", shared=tmp_path).with_overrides(*OFTEN)
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
    return (folder / "console.txt").read_text()[-4000:]
