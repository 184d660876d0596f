"""What can break in a run, each kind a function: when it strikes, how, and how the command may end of it."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from journeys import Journey

from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader, IncompleteCheckpointError

MOVED_CLOCK = Path(__file__).parent / "clock"
VICTIM_WITHIN_S = 60
KILLED, INTERRUPTED, TERMINATED = -signal.SIGKILL, 128 + signal.SIGINT, 128 + signal.SIGTERM


@dataclass(frozen=True)
class Fault:
    """One thing that breaks: of a kind, at a step of a phase (or by the clock), for so long.

    Where `after_s` is given it strikes that long after the fault before it, whatever the run does then; else when the
    metrics have come to `step` since the fault before it.
    """

    kind: str
    phase: str
    step: int
    seconds: float
    pick: int
    workers: str | None = None
    after_s: float | None = None


@dataclass(frozen=True)
class Scene:
    """Where a fault strikes: a run and its driver, which may have just been started again."""

    journey: Journey
    driver: subprocess.Popen
    fault: Fault
    clock: Path
    below: list[psutil.Process]

    def victims(self, title: str) -> list[psutil.Process]:
        """The driver's processes of that title or name; where there are none yet, waits for one for a while.

        A look at all processes takes long on a busy machine, so the one that was just taken is used first.
        """
        deadline, below = time.monotonic() + VICTIM_WITHIN_S, self.below
        while self.driver.poll() is None and time.monotonic() < deadline:
            if found := [each for each in below if is_titled(each, title)]:
                return sorted(found, key=lambda each: each.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(self.driver.pid).children(recursive=True)
        return []

    def victim(self, title: str) -> psutil.Process | None:
        found = self.victims(title)
        return found[self.fault.pick % len(found)] if found else None

    @property
    def checkpoints(self) -> Path:
        return self.journey.workspace / "checkpoints" / self.fault.phase


def is_titled(process: psutil.Process, title: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and (
            process.name() == title or " ".join(process.cmdline()).startswith(f"ray::{title}")
        )
    return False


def incomplete(folder: Path) -> bool:
    """Whether the newest checkpoint's folder is not whole."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return False
    try:
        CheckpointReader(open_store(str(found[-1])))
    except (IncompleteCheckpointError, ValueError, FileNotFoundError):
        return True
    return False


def evaluating(journey: Journey, phase: str) -> bool:
    """Whether the last row is a step after which an evaluation has to come."""
    rows = journey.rows(phase)
    return bool(rows) and rows[-1]["kind"] == "step" and rows[-1]["step"] % 4 == 0


def wait_for(holds: Callable[[], bool], scene: Scene, seconds: float) -> bool:
    """Whether it came to hold in that time, looked at very often: some moments are milliseconds long."""
    deadline = time.monotonic() + seconds
    while scene.driver.poll() is None and time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.001)
    return False


Struck = str
"""What was done, in a few words; empty where there was nothing to strike at."""


def kill(title: str) -> Callable[[Scene], Struck]:
    def strike(scene: Scene) -> Struck:
        if (victim := scene.victim(title)) is None:
            return ""
        victim.send_signal(signal.SIGKILL)
        return f"SIGKILL to {title} {victim.pid}"

    return strike


def kill_while(title: str | None, holds: Callable[[Scene], bool], what: str) -> Callable[[Scene], Struck]:
    """Kill one of Ray's processes, or the driver, at the first moment that something holds."""

    def strike(scene: Scene) -> Struck:
        victim = scene.victim(title) if title else psutil.Process(scene.driver.pid)
        if victim is None or not wait_for(lambda: holds(scene), scene, 60):
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
        time.sleep(0.05)
        still = "and it stayed so" if holds(scene) else "but it was over by then"
        return f"SIGKILL to {title or 'the driver'} while {what}, {still}"

    return strike


def signal_driver(number: signal.Signals) -> Callable[[Scene], Struck]:
    def strike(scene: Scene) -> Struck:
        scene.driver.send_signal(number)
        return f"{number.name} to the driver"

    return strike


def pause(title: str) -> Callable[[Scene], Struck]:
    def strike(scene: Scene) -> Struck:
        if (victim := scene.victim(title)) is None:
            return ""
        victim.send_signal(signal.SIGSTOP)
        try:
            time.sleep(scene.fault.seconds)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)
        return f"SIGSTOP to {title} for {scene.fault.seconds:.1f} s"

    return strike


def hang(scene: Scene) -> Struck:
    """A worker that never answers again."""
    if (victim := scene.victim("RayTrainWorker")) is None:
        return ""
    victim.send_signal(signal.SIGSTOP)
    return f"SIGSTOP to RayTrainWorker {victim.pid} for ever"


def refuse_checkpoints(scene: Scene) -> Struck:
    """A file stands where the phase's checkpoints belong: every write and every listing fails."""
    folder, away = scene.checkpoints, scene.checkpoints.with_suffix(".away")
    if not folder.exists():
        return ""
    folder.rename(away)
    folder.write_text("no folder")
    try:
        time.sleep(scene.fault.seconds)
    finally:
        if folder.is_dir():  # somebody got past the file
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        away.rename(folder)
    return f"no folder for checkpoints for {scene.fault.seconds:.1f} s"


def fill_disk(scene: Scene) -> Struck:
    """The workspace's file system has not a byte left, for a while."""
    ballast = scene.journey.workspace / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            for block in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * block)
        time.sleep(scene.fault.seconds)
    finally:
        ballast.unlink(missing_ok=True)
    return f"file system full for {scene.fault.seconds:.1f} s"


def jump(scene: Scene) -> Struck:
    """The wall clock of all the run's Python processes goes an hour on, or back."""
    offset_s = int(scene.clock.read_text()) + (3600, -3600)[scene.fault.pick % 2]
    scene.clock.write_text(str(offset_s))
    return f"wall clock to {offset_s:+} s"


@dataclass(frozen=True)
class Kind:
    """What must follow: `ends` are the statuses with which the command may end of it; without any it goes on."""

    strike: Callable[[Scene], Struck]
    ends: frozenset[int] = frozenset()
    may_go_on: bool = True


def must_end(*statuses: int) -> dict[str, object]:
    return {"ends": frozenset(statuses), "may_go_on": False}


FAILED = frozenset({1})
LOST_RAY = frozenset({1, KILLED, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGTERM, INTERRUPTED, TERMINATED})
SAVING = (lambda scene: incomplete(scene.checkpoints), "a checkpoint was incomplete")
EVALUATING = (lambda scene: evaluating(scene.journey, scene.fault.phase), "an evaluation was collected")
KINDS: dict[str, Kind] = {
    "worker_killed": Kind(kill("RayTrainWorker")),
    "feeder_killed": Kind(kill("SequenceFeeder")),
    "domain_weights_killed": Kind(kill("DomainWeights")),
    "run_log_killed": Kind(kill("RunLog")),
    "worker_killed_while_saving": Kind(kill_while("RayTrainWorker", *SAVING)),
    "worker_killed_while_evaluating": Kind(kill_while("RayTrainWorker", *EVALUATING)),
    "worker_paused": Kind(pause("RayTrainWorker")),
    "feeder_paused": Kind(pause("SequenceFeeder")),
    "controller_killed": Kind(kill("TrainController"), FAILED),
    "raylet_killed": Kind(kill("raylet"), LOST_RAY),
    "gcs_killed": Kind(kill("gcs_server"), LOST_RAY),
    "driver_killed": Kind(signal_driver(signal.SIGKILL), **must_end(KILLED)),
    "driver_killed_while_saving": Kind(kill_while(None, *SAVING), **must_end(KILLED)),
    "driver_terminated": Kind(signal_driver(signal.SIGTERM), **must_end(TERMINATED)),
    "driver_interrupted": Kind(signal_driver(signal.SIGINT), **must_end(INTERRUPTED)),
    "workers_changed": Kind(signal_driver(signal.SIGTERM), **must_end(TERMINATED)),
    "checkpoints_refused": Kind(refuse_checkpoints, FAILED),
    "disk_full": Kind(fill_disk, FAILED),
    "worker_hung": Kind(hang),
    "clock_jumped": Kind(jump),
}
# What such a fault takes in the environment of the run; they are struck with in runs of their own.
ASIDE: dict[str, dict[str, str]] = {
    "worker_hung": {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30"},
    "clock_jumped": {"PYTHONPATH": os.pathsep.join([str(MOVED_CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])])},
}


@dataclass(frozen=True)
class Schedule:
    """Faults in the order in which they strike; a seed gives the same ones everywhere."""

    seed: int
    faults: tuple[Fault, ...]

    @classmethod
    def drawn(cls, seed: int, count: int, steps: int, kinds: list[str]) -> "Schedule":
        """Every kind once before one comes twice, at random moments of both phases of `steps` steps."""
        dice = random.Random(seed)
        names: list[str] = []
        while len(names) < count:
            names += dice.sample(kinds, len(kinds))
        dice.shuffle(chosen := names[:count])
        moments = sorted((dice.choice(("pruning", "recovery")), dice.randrange(2, steps - 4)) for _ in chosen)
        return cls(seed, tuple(cls._fault(dice, *words) for words in zip(chosen, moments, strict=True)))

    @staticmethod
    def _fault(dice: random.Random, kind: str, moment: tuple[str, int]) -> Fault:
        workers = dice.choice(("1", "4", "{min: 1, max: 2}")) if kind == "workers_changed" else None
        by_clock = dice.uniform(0.0, 8.0) if dice.random() < 0.25 else None
        return Fault(kind, *moment, round(dice.uniform(3.0, 9.0), 1), dice.randrange(100), workers, by_clock)

    @property
    def keeps_order(self) -> bool:
        """Whether all sums are done by as many workers, in the same order, as in a run that nothing befell."""
        return all(fault.workers is None for fault in self.faults)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A folder on a file system of its own, of that size, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "shear-chaos", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
