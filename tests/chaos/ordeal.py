"""A run of the real command under a schedule of faults, and what was found of it afterwards.

python tests/chaos/ordeal.py FOLDER FAULTS SEED ... [KIND ...]
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]  # also where this is run as a script

import psutil  # noqa: E402
from faults import ASIDE, KINDS, Fault, Scene, Schedule, small_disk  # noqa: E402
from journeys import (  # noqa: E402
    SCRIPT,
    Journey,
    check_data_account,
    end_with_children,
    environment,
    largest_loss_difference,
    newest_step,
    small_journey,
)

STEPS, BATCH_SEQUENCES = 40, 8
OVERRIDES = (f"pruning.steps={STEPS}", f"recovery.steps={STEPS}", "engine.max_failures=50")
PHASES = ("pruning", "recovery")
ROUNDING, REARRANGED = 1e-5, 2e-3  # nats a token, as in tests/test_faults.py
GONE_WITHIN_S = 120  # Ray's own agents try for 60 s to tell a dead node of its death
WHOLE_WITHIN_S = 1500
DISK_MEGABYTES = 96


@dataclass
class Blow:
    """One fault as it struck. `lost_steps` were done again; `back_after_s` until the next new step was written."""

    fault: Fault
    done: str = ""
    at_step: int = 0
    row: int = 0
    status: int | None = None
    lost_steps: int = 0
    back_after_s: float | None = None


@dataclass
class Outcome:
    """What a run under faults came to; `problems` is empty where all held."""

    seed: int
    blows: list[Blow] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def struck(self) -> list[Blow]:
        return [blow for blow in self.blows if blow.done]


def unharmed_run(home: Path, name: str) -> Journey:
    """A run that nothing befalls; runs of one home share text and corpus."""
    journey = small_journey(home / name, shared=home).with_overrides(*OVERRIDES)
    done = journey.run(timeout_s=1200)
    assert done.returncode == 0, done.stderr
    return journey


def spread(one: Journey, other: Journey) -> dict[str, float]:
    """Largest difference of any loss, by phase."""
    return {phase: largest_loss_difference(one.rows(phase), other.rows(phase)) for phase in PHASES}


class Ordeal:
    """One run under a schedule; the command is started again by the same words whenever a fault ended it."""

    def __init__(self, schedule: Schedule, unharmed: Journey, folder: Path) -> None:
        self.schedule, self.unharmed, self.folder = schedule, unharmed, folder
        self.outcome = Outcome(schedule.seed)
        self.clock = folder / "clock"
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.shared_memory = set(os.listdir("/dev/shm"))

    def run(self) -> Outcome:
        """Go through the whole schedule, to the end of the run."""
        self.folder.mkdir(parents=True)
        self.clock.write_text("0")
        began_s = time.monotonic()
        with small_disk(self.folder / "run", DISK_MEGABYTES):
            self.journey = ready_journey(self.unharmed, self.folder)
            self.driver = self._start()
            try:
                for fault in self.schedule.faults:
                    self._strike(fault)
                    (self.folder / "outcome.json").write_text(json.dumps(asdict(self.outcome), indent=1))
                self._finish(began_s)
            finally:
                end_with_children(self.driver)
            self.outcome.seconds = time.monotonic() - began_s
            self._check()
            self._keep()
        return self.outcome

    def _start(self) -> subprocess.Popen:
        words = environment() | {"SHEAR_TEST_CLOCK": str(self.clock)}
        for kind in ASIDE.keys() & {fault.kind for fault in self.schedule.faults}:
            words |= ASIDE[kind]
        self.outcome.starts += 1
        with (self.folder / "console.txt").open("a") as console:
            self.said_before = console.tell()
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), *self.journey.arguments],
                stdout=console, stderr=console, cwd=ROOT, env=words, start_new_session=True,
            )  # fmt: skip

    def _watch(self) -> list[psutil.Process]:
        """Every process below the driver, remembered, whoever its parent is later."""
        below = psutil.Process(self.driver.pid).children(recursive=True) if self.driver.poll() is None else []
        self.seen |= {(each.pid, each.create_time()): each for each in below}
        return below

    def _strike(self, fault: Fault) -> None:
        blow = Blow(fault)
        self.outcome.blows.append(blow)
        last = self.outcome.struck[-1] if self.outcome.struck else None
        if fault.after_s is not None:
            time.sleep(fault.after_s)
            self._start_again(last)
        else:
            self._wait_for(fault, last)
        if self.driver.poll() is not None or self._phase_is_over(fault):
            return
        below = self._watch()
        blow.row, blow.at_step = len(self.journey.rows(fault.phase)), newest_step(self.journey, fault.phase)
        self.blow_s = time.monotonic()
        blow.done = KINDS[fault.kind].strike(Scene(self.journey, self.driver, fault, self.clock, below))
        if fault.workers is not None and blow.done:
            self.journey = self.journey.with_overrides(f"engine.workers={fault.workers}")
        if not KINDS[fault.kind].may_go_on and blow.done:
            self._ended_by(blow)

    def _wait_for(self, fault: Fault, last: Blow | None) -> None:
        """Until the metrics have come to the fault's step since the last blow, whatever starts that takes."""
        row = last.row if last and last.fault.phase == fault.phase else 0
        deadline = time.monotonic() + WHOLE_WITHIN_S
        while newest_step(self.journey, fault.phase, row) < fault.step and not self._phase_is_over(fault):
            assert time.monotonic() < deadline, f"waited in vain for step {fault.step} of {fault.phase}"
            self._note_return(last)
            self._start_again(last)
            time.sleep(0.03)
        self._note_return(last)

    def _phase_is_over(self, fault: Fault) -> bool:
        mark = self.journey.workspace / "stages" / f"{fault.phase}.json"
        return mark.exists() and json.loads(mark.read_text()).get("finished") is not None

    def _note_return(self, last: Blow | None) -> None:
        if last and last.done and last.back_after_s is None:
            rows = self.journey.rows(last.fault.phase)[last.row :]
            if any(row["kind"] == "step" and row["step"] > last.at_step for row in rows):
                last.back_after_s = round(time.monotonic() - self.blow_s, 1)

    def _start_again(self, last: Blow | None) -> None:
        """Start the command again where it ended, and see that the last blow may have ended it."""
        if self.driver.poll() is None:
            return
        if last is None or not last.done:
            raise AssertionError(f"the command ended with {self.driver.returncode}: {self.console()}")
        self._ended_by(last)

    def _ended_by(self, blow: Blow) -> None:
        blow.status = self.driver.wait(timeout=240)
        allowed = KINDS[blow.fault.kind].ends
        if (
            self.folder / "console.txt"
        ).stat().st_size == self.said_before:  # Python was not up yet: the signal's own end
            allowed |= {128 - status for status in allowed if status > 128}
        if blow.status not in allowed:
            self.outcome.problems.append(f"{blow.fault.kind}: status {blow.status}, not one of {sorted(allowed)}")
        self._check_gone(blow.fault.kind)
        self.driver = self._start()

    def _finish(self, began_s: float) -> None:
        last = self.outcome.struck[-1] if self.outcome.struck else Blow(self.schedule.faults[-1])
        while True:
            while self.driver.poll() is None:
                self._note_return(last)
                assert time.monotonic() - began_s < WHOLE_WITHIN_S, f"the run goes on for too long: {self.console()}"
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._watch()
                time.sleep(0.5)
            if self.driver.returncode == 0:
                break
            assert last.status is None, f"the command ended with {self.driver.returncode}: {self.console()}"
            self._ended_by(last)
        self._check_gone("the end")

    def _check_gone(self, what: str) -> None:
        _, left = psutil.wait_procs(list(self.seen.values()), timeout=GONE_WITHIN_S)
        titles = []
        for each in left:
            with contextlib.suppress(psutil.Error):
                titles.append(f"{each.status()} {' '.join(each.cmdline())[:80]}")
        if titles:
            self.outcome.problems.append(f"{what}: processes left behind: {titles}")
        self.seen = {}

    def console(self) -> str:
        return (self.folder / "console.txt").read_text()[-3000:]

    def _check(self) -> None:
        """Every promise that has to hold after a run, each looked into though another be broken."""
        problems, journey = self.outcome.problems, self.journey
        for phase in PHASES:
            with noted(problems, phase):
                rows = journey.rows(phase)
                self._count_lost(phase, rows)
                check_data_account(rows, STEPS, BATCH_SEQUENCES, journey.checkpoints(phase)[-1])
        with noted(problems, "losses"):
            self.outcome.differences = spread(journey, self.unharmed)
            allowed = ROUNDING if self.schedule.keeps_order else REARRANGED
            assert max(self.outcome.differences.values()) < allowed, f"{self.outcome.differences}, allowed {allowed}"
        with noted(problems, "shared memory"):
            left = abandoned(set(os.listdir("/dev/shm")) - self.shared_memory)
            assert left == [], f"left in /dev/shm: {left}"
        with noted(problems, "lock"), (journey.workspace / "driver.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with noted(problems, "results"):
            for folder in ("report", "model"):
                assert names(journey.workspace / folder) == names(self.unharmed.workspace / folder)
            assert (journey.workspace / "report/index.html").read_text().rstrip().endswith("</html>")
            assert list(journey.workspace.rglob("*.partial")) == []

    def _count_lost(self, phase: str, rows: list[dict[str, Any]]) -> None:
        blows = [blow for blow in self.outcome.struck if blow.fault.phase == phase]
        for blow, following in itertools.zip_longest(blows, blows[1:]):
            end = following.row if following else len(rows)
            before = max((row["step"] for row in rows[: blow.row] if row["kind"] == "step"), default=0)
            after = [row["step"] for row in rows[blow.row : end] if row["kind"] == "step"]
            steps = [before, *after]
            blow.lost_steps = max((one - two + 1 for one, two in itertools.pairwise(steps) if two <= one), default=0)

    def _keep(self) -> None:
        """Copy what tells of the run out of a file system that ends with it."""
        for name in ("metrics", "stages", "mixture"):
            shutil.copytree(self.journey.workspace / name, self.folder / "kept" / name)


def ready_journey(unharmed: Journey, folder: Path) -> Journey:
    """A run whose driver ended before mask learning, in a folder that may be there already."""
    journey = small_journey(folder, shared=unharmed.workspace.parents[1]).with_overrides(*OVERRIDES)
    (journey.workspace / "stages").mkdir(parents=True)
    for stage in ("corpus", "source", "references"):
        shutil.copy(unharmed.workspace / "stages" / f"{stage}.json", journey.workspace / "stages")
    return journey


@contextlib.contextmanager
def noted(problems: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, OSError, LookupError, ValueError) as error:
        problems.append(f"{what}: {type(error).__name__}: {str(error)[:600]}")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def abandoned(new: set[str]) -> list[str]:
    """Of these files of shared memory, those that no living process has mapped or open."""
    held: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (folder / "maps").read_text().splitlines()
            held |= {Path(line.split()[-1]).name for line in maps if "/dev/shm/" in line}
            held |= {file.readlink().name for file in (folder / "fd").iterdir()}
    return sorted(name for name in new - held if Path("/dev/shm", name).exists())


def available_kinds(disk: bool) -> list[str]:
    """Kinds that this machine can bring about in any run."""
    absent = set() if disk else {"disk_full"}
    return [name for name in KINDS if name not in absent | ASIDE.keys()]


def main(folder: str, count: str, *words: str) -> None:
    home, seeds = Path(folder), [word for word in words if word.isdigit()]
    with small_disk(home / "probe", 1) as disk:
        pass
    first = small_journey(home / "first", shared=home).with_overrides(*OVERRIDES)
    if not (first.workspace / "report").exists():
        first = unharmed_run(home, "first")
    for seed in seeds:
        kinds = [word for word in words if not word.isdigit()] or available_kinds(disk)
        schedule = Schedule.drawn(int(seed), int(count), STEPS, kinds)
        sys.stdout.write(json.dumps(asdict(schedule)) + "\n")
        outcome = Ordeal(schedule, first, home / f"seed-{seed}").run()
        text = json.dumps(asdict(outcome), indent=1)
        (home / f"seed-{seed}.json").write_text(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
