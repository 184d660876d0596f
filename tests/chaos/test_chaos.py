"""Faults at random moments of real runs: all of them are got over, and none shows in what comes out."""

import json
import sys
from dataclasses import asdict

import pytest
from faults import ASIDE, KINDS, Schedule, small_disk
from journeys import Journey
from ordeal import ROUNDING, STEPS, Ordeal, abandoned, available_kinds, spread, unharmed_run

SEEDS, FAULTS = (1, 2, 3, 4, 5, 6), 11
WITHIN_S = 2400


@pytest.fixture(scope="session")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """A run that nothing befell; another one does not differ from it by more than rounding."""
    home = tmp_path_factory.mktemp("chaos")
    first, second = unharmed_run(home, "first"), unharmed_run(home, "second")
    assert max(spread(first, second).values()) < ROUNDING
    return first


def test_a_seed_gives_one_schedule_and_every_kind_its_turn():
    """Catches a failure that nobody can bring about again, and a kind that is described but never struck with."""
    kinds = available_kinds(disk=True)
    schedules = [Schedule.drawn(seed, FAULTS, STEPS, kinds) for seed in SEEDS]
    assert schedules == [Schedule.drawn(seed, FAULTS, STEPS, kinds) for seed in SEEDS]
    assert len({schedule.faults for schedule in schedules}) == len(SEEDS)
    faults = [fault for schedule in schedules for fault in schedule.faults]
    assert len(faults) >= 50
    assert {fault.kind for fault in faults} == KINDS.keys() - ASIDE.keys()
    assert all((fault.workers is not None) == (fault.kind == "workers_changed") for fault in faults)
    for schedule in schedules:
        moments = [(fault.phase, fault.step) for fault in schedule.faults]
        assert moments == sorted(moments)


def test_shared_memory_that_somebody_uses_is_not_abandoned(tmp_path):
    """Catches a look for leftovers that blames a run for its neighbours' segments, or that finds nothing at all."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=4096)
    name = memory.name.removeprefix("/")
    try:
        assert abandoned({name}) == []
        memory.close()
        assert abandoned({name}) == [name]
    finally:
        memory.unlink()


@pytest.mark.slow
@pytest.mark.timeout(WITHIN_S)
@pytest.mark.parametrize("seed", SEEDS)
def test_run_under_faults(unharmed, tmp_path, seed):
    """Catches whatever a kill, a pause or a storage that fails can lose, repeat, tear or leave behind."""
    with small_disk(tmp_path / "probe", 1) as disk:
        pass
    schedule = Schedule.drawn(seed, FAULTS, STEPS, available_kinds(disk))
    sys.stdout.write(json.dumps(asdict(schedule)) + "\n")
    outcome = Ordeal(schedule, unharmed, tmp_path / "harmed").run()
    sys.stdout.write(json.dumps(asdict(outcome), indent=1) + "\n")
    assert outcome.problems == []
    assert len(outcome.struck) >= FAULTS // 2, "most faults found nothing to strike at"


@pytest.mark.slow
@pytest.mark.timeout(WITHIN_S)
@pytest.mark.parametrize("kind", ASIDE)
def test_run_under_faults_of_one_kind(unharmed, tmp_path, kind):
    """Catches a group that waits for ever for a worker that does not answer, and deadlines by the wall clock."""
    outcome = Ordeal(Schedule.drawn(6, 3, STEPS, [kind]), unharmed, tmp_path / "harmed").run()
    assert outcome.problems == []
    assert outcome.struck
