"""Where a step's time goes: spans against brute force, real steps of two ranks, torch's profiler without a GPU."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phase_runs import new_trainer
from torch.autograd import DeviceType

from shearing.training import step_clock
from shearing.training.loop import training_reports
from shearing.training.step_clock import (
    FIRST_SAMPLE_STEP,
    SAMPLE_EVERY_STEPS,
    SampledWaits,
    StepClock,
    exposed_communication,
    length_within,
    without,
)

PARTS = ("data_wait_s", "forward_backward_s", "communication_s", "update_s")
PAUSE_S = 0.3
FILE_CLOCK_S = 0.02
"""How far a file's time may be behind the clock, and more: the kernel stamps files by its last tick."""

span_lists = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda at: (at[0], at[0] + at[1])))


@given(span_lists, span_lists, st.integers(0, 40), st.integers(0, 40))
def test_spans_against_counting_every_tick(spans, others, begin, end):
    """Overlapping kernels counted twice, a kernel within another that uncovers what still runs, an empty span."""

    def ticks(some):
        return {tick for first, last in some for tick in range(first, last)}

    found = without(spans, others)
    assert ticks(found) == ticks(spans) - ticks(others)
    assert sum(last - first for first, last in found) == len(ticks(found)), "disjoint"
    assert length_within(found, begin, end) == len(ticks(found) & set(range(begin, end)))


@dataclass
class Event:
    """One of torch's profiler."""

    kind: str
    begin: int
    ending: int
    device: DeviceType = DeviceType.CUDA
    annotation: bool = False

    def name(self):
        return self.kind

    def start_ns(self):
        return self.begin

    def end_ns(self):
        return self.ending

    def device_type(self):
        return self.device

    def is_user_annotation(self):
        return self.annotation


def test_communication_beside_computing_is_not_exposed():
    """Ranges of annotations that cover kernels taken for work of the device; copies or the host's calls overlooked."""
    events = [
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 100, 200),
        Event("nccl:all_reduce", 90, 210, annotation=True),
        Event("Optimizer.step#AdamW.step", 0, 1000, annotation=True),
        Event("ampere_sgemm_128x64_tn", 60, 120),
        Event("Memcpy DtoD (Device -> Device)", 150, 160),
        Event("cudaLaunchKernel", 170, 190, device=DeviceType.CPU),
    ]
    assert exposed_communication(events) == [(120, 150), (160, 200)]
    assert exposed_communication(events[3:5]) == []
    assert exposed_communication(events[5:]) is None, "no GPU seen is not the same as no communication"


def pausing_steps(rank, world, phase):
    """Step rows of a phase in which rank 1 pauses before a backward pass until rank 0 has waited for it for a while.

    Rank 0 holds a file while it waits, and rank 1 goes on only when one wait has lasted for the pause: however busy the
    machine, waits for what is there already and the computing between them cannot pass for it.
    """
    trainer = new_trainer(rank, world, phase)
    held = Path(phase.corpus).parent / "rank-0-waits"
    accumulate, wait = trainer.engine.accumulate, step_clock.WAIT
    met = []

    def holding(*arguments, **named):
        held.touch()
        try:
            return wait(*arguments, **named)
        finally:
            held.unlink(missing_ok=True)

    def held_for_s():
        try:
            return time.time() - held.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def paused(*arguments):
        if trainer.state.step == 2 and not met:
            met.append(True)
            if rank == 0:
                step_clock.WAIT = holding
            else:
                time.sleep(PAUSE_S)
                while held_for_s() < PAUSE_S + FILE_CLOCK_S:
                    time.sleep(0.01)
        accumulate(*arguments)

    trainer.engine.accumulate = paused
    try:
        return [report for report in training_reports(trainer) if report["kind"] == "step"]
    finally:
        step_clock.WAIT = wait


KINDS = {
    "zero 1": {"stage": 1},
    "zero 2, adapters": {"stage": 2, "lora": {"rank": 4}},
    "zero 3, gates, checkpointing": {"stage": 3, "pruning": True, "engine": {"activation_checkpointing": True}},
    "zero 3, teacher": {"stage": 3, "distillation": {}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_late_is_the_others_communication(tiny_run, two_processes, kind):
    """Waiting for others taken for computing; parts that overlap or leave something out; a stage that is not timed."""
    settings = dict(KINDS[kind])
    if "distillation" in settings:
        settings["distillation"] = {"teacher": tiny_run.model}
    rows, late = two_processes.run(pausing_steps, tiny_run.phase(**settings))
    for row in (*rows, *late):
        assert sum(row[part] for part in PARTS) == pytest.approx(row["step_s"], abs=1e-9)
        assert min(row[part] for part in PARTS) >= 0
        assert row["communication_s"] > 0, "a step without a collective there is not"
    assert rows[2]["communication_s"] >= PAUSE_S
    assert late[2]["forward_backward_s"] >= PAUSE_S


def unsplit_steps(rank, world, phase):
    """Step rows and how often the profiler was started, in a process without a GPU."""
    trainer, started = new_trainer(rank, world, phase), []
    trainer.clock = StepClock(SampledWaits(rank))
    profile = torch.profiler.profile

    def watched(**words):
        started.append(trainer.state.step + 1)
        return profile(**words)

    torch.profiler.profile = watched
    try:
        return [report for report in training_reports(trainer) if report["kind"] == "step"], started
    finally:
        torch.profiler.profile = profile


def test_a_profiler_that_fails_leaves_the_training_alone(tiny_run, one_process):
    """A run that ends since nothing could be profiled, or that tries again at every step."""
    ((rows, started),) = one_process.run(unsplit_steps, tiny_run.phase())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert started == [FIRST_SAMPLE_STEP]
    assert all({"step_s", "data_wait_s"} < row.keys() and "communication_s" not in row for row in rows)


@pytest.fixture
def profiled_cpu(monkeypatch):
    """torch's profiler, of the CPU where the GPU is asked for; what it saw named `slept` counts as communication."""
    profile, cpu = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=cpu))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def slept(events):
        return [(event.start_ns(), event.end_ns()) for event in events if event.name() == "slept"]

    monkeypatch.setattr(step_clock, "exposed_communication", slept)


def made_step(clock, sleep_s):
    clock.begin()
    clock.begin_forward()
    before = time.perf_counter()
    with torch.profiler.record_function("slept"):
        time.sleep(sleep_s)
    after = time.perf_counter()
    clock.begin_update()
    return clock.end(0.0), after - before


class TestSamples:
    def test_which_steps_are_sampled(self, profiled_cpu):
        # catches samples at every step or only once, and other ranks than the one that reports
        clocks = [StepClock(SampledWaits(rank)) for rank in (0, 1)]
        steps = range(1, FIRST_SAMPLE_STEP + 2 * SAMPLE_EVERY_STEPS + 1)
        # so long that the profiler's own time is a small share of them
        clocks[0].waits.end = lambda _, end=clocks[0].waits.end: end(1e6)
        sampled = [[step for step in steps if "communication_s" in made_step(clock, 0.0)[0]] for clock in clocks]
        assert sampled == [[FIRST_SAMPLE_STEP + SAMPLE_EVERY_STEPS * n for n in range(3)], []]

    def test_costly_samples_are_rare(self, profiled_cpu):
        # catches a profiler that takes more of short steps than it may
        waits = SampledWaits(0)
        waits.steps_before = 0
        waits.begin()
        waits.end(1e-6)
        assert waits.steps_before >= 1e5, "the profiler's start and stop take a millisecond at the very least"

    def test_the_profilers_clock_and_ours_are_one(self, profiled_cpu):
        # catches spans of another zero or unit, which would fall outside of the step
        clock = StepClock(SampledWaits(0))
        clock.waits.steps_before = 0
        seconds, slept_s = made_step(clock, 0.2)
        assert 0.2 <= seconds["communication_s"] + 1e-3 <= slept_s + 2e-3
        assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["step_s"], abs=1e-9)
