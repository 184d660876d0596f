"""Where the time of a step goes: waiting for data, forward and backward, communication, update.

Communication is what is exposed of it: the time in which a rank did nothing but wait for collectives, the lateness of
other ranks included. What goes on beside computing takes no time and is not counted.
Spans are (begin, end) in nanoseconds of `time.perf_counter_ns`.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

logger = logging.getLogger(__name__)

Span = tuple[int, int]

WAIT: Any = dist.Work.wait
FIRST_SAMPLE_STEP = 3
"""Of a life of the workers: the steps before it allocate memory and choose kernels."""
SAMPLE_EVERY_STEPS = 50
SAMPLES_SHARE = 0.005
"""Of the time of all steps, that samples may take; where they would take more they become rarer."""


class Waits(Protocol):
    """Whoever knows when a step stood still for collectives."""

    def begin(self) -> None:
        """A step begins."""

    def settle(self) -> None:
        """Where this step is watched, let the device catch up with the host."""

    def end(self, step_s: float) -> list[Span] | None:
        """The step is over: when it stood still, in disjoint spans; None where it was not watched."""


class BlockedWaits:
    """Every step on CPU, where waiting for a collective blocks the thread that trains.

    Whoever starts a collective, at once or later calls `wait` of the Work that it was given: those calls are timed.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def begin(self) -> None:
        """Time all waits from here on."""
        spans = self.spans = []

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return WAIT(*arguments, **named)
            finally:
                spans.append((began, time.perf_counter_ns()))

        dist.Work.wait = timed  # type: ignore[method-assign]

    def settle(self) -> None:
        """The device is the host."""

    def end(self, step_s: float) -> list[Span] | None:  # noqa: ARG002
        """When the thread waited."""
        dist.Work.wait = WAIT  # type: ignore[method-assign]
        return self.spans


class SampledWaits:
    """One step in many on a GPU: when it ran kernels of NCCL and nothing else, as torch's profiler sees it.

    A profiler that fails ends the sampling, never the training.

    Args:
        rank: Only rank 0, whose reports are kept, samples.
    """

    def __init__(self, rank: int) -> None:
        self.steps_before: float = FIRST_SAMPLE_STEP - 1 if rank == 0 else math.inf
        self.profiler: Any = None
        self.unix_ns, self.cost_s = 0, 0.0

    def begin(self) -> None:
        """Start the profiler, if this step is to be a sample."""
        if self.steps_before > 0:
            self.steps_before -= 1
            return
        began_s = time.perf_counter()
        try:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        except Exception:
            self._give_up()
        self.unix_ns = time.time_ns() - time.perf_counter_ns()  # the profiler has Unix times
        self.cost_s = time.perf_counter() - began_s

    def settle(self) -> None:
        """Wait for the GPU."""
        if self.profiler is not None:
            torch.cuda.synchronize()

    def end(self, step_s: float) -> list[Span] | None:
        """When only NCCL worked; None for a step that was no sample, or in which no GPU was seen."""
        if self.profiler is None:
            return None
        began_s = time.perf_counter()
        try:
            self.profiler.stop()
            spans = exposed_communication(self.profiler.profiler.kineto_results.events())
        except Exception:
            self._give_up()
            return None
        self.profiler = None
        self.cost_s += time.perf_counter() - began_s
        self.steps_before = max(SAMPLE_EVERY_STEPS, math.ceil(self.cost_s / (SAMPLES_SHARE * step_s))) - 1
        return spans and [(begin - self.unix_ns, end - self.unix_ns) for begin, end in spans]

    def _give_up(self) -> None:
        logger.exception("torch's profiler failed: steps are not split any more")
        self.profiler, self.steps_before = None, math.inf


class StepClock:
    """Times the steps of one rank: `begin`, `begin_forward`, `begin_update`, `end`, in this order.

    Args:
        waits: Tells when a step stood still.
    """

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.began = self.forward = self.update = 0

    def begin(self) -> None:
        """The step begins."""
        self.waits.begin()
        self.began = self.forward = self.update = time.perf_counter_ns()

    def begin_forward(self) -> None:
        """The first micro-batch begins."""
        self.forward = time.perf_counter_ns()

    def begin_update(self) -> None:
        """The last micro-batch's backward pass is done."""
        self.waits.settle()
        self.update = time.perf_counter_ns()

    def end(self, data_wait_s: float) -> dict[str, float]:
        """Seconds of the step, `step_s`, and of its parts, which add up to it.

        `update_s` is the rest: the update of weights and gates, and what the loop itself does. Only `step_s` and
        `data_wait_s` where the step was not watched.
        """
        ended = time.perf_counter_ns()
        step_s = (ended - self.began) / 1e9
        seconds = {"step_s": step_s, "data_wait_s": data_wait_s}
        spans = self.waits.end(step_s)
        if spans is None:
            return seconds
        passes_s = (self.update - self.forward - length_within(spans, self.forward, self.update)) / 1e9
        communication_s = length_within(spans, self.began, ended) / 1e9
        seconds |= {"forward_backward_s": passes_s, "communication_s": communication_s}
        return seconds | {"update_s": step_s - data_wait_s - passes_s - communication_s}


def clock_for(device: torch.device, rank: int) -> StepClock:
    """The clock of a rank on this kind of device."""
    return StepClock(SampledWaits(rank) if device.type == "cuda" else BlockedWaits())


def exposed_communication(events: Iterable[Any]) -> list[Span] | None:
    """When a GPU ran kernels of NCCL alone, in Unix nanoseconds; None where the profiler saw it do nothing at all.

    Args:
        events: Of torch's profiler; which of them a device really did is told as torch itself does in its tables.
    """
    done = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    collectives, others = (
        [(e.start_ns(), e.end_ns()) for e in done if e.name().startswith("nccl") == wanted] for wanted in (True, False)
    )
    return without(collectives, others) if done else None


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """Where any of `spans` is and none of `others`: disjoint, in order."""
    edges = [(begin, kind, 1) for kind, some in enumerate((spans, others)) for begin, _ in some]
    edges += [(end, kind, -1) for kind, some in enumerate((spans, others)) for _, end in some]
    depth, found = [0, 0], []
    for (at, kind, change), (following, *_) in itertools.pairwise(sorted(edges)):
        depth[kind] += change
        if at < following and depth[0] and not depth[1]:
            found.append((at, following))
    return found


def length_within(spans: list[Span], begin: int, end: int) -> int:
    """Nanoseconds of disjoint spans that lie between `begin` and `end`."""
    return sum(max(0, min(last, end) - max(first, begin)) for first, last in spans)
