"""What a step of training takes, on paper: compute, communication, data, evaluation, mixture, checkpoint.

First principles and the constants of `orchestrator.hardware`; `docs/SCALING.md` has the formulas and what they say of
large runs. Loads neither torch nor Ray.
"""

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.hardware import Hardware
from orchestrator.memory_forecast import DTYPE_BYTES, WorkerMemory, checkpoint_bytes, worker_memory
from shearing.data.source import STEPS_A_REQUEST
from shearing.models.family import shape_of, vocabulary_of
from shearing.models.flops import FROZEN_SHARE, training_flops_per_token
from shearing.models.parameters import count_parameters
from shearing.training.config import EngineConfig, TrainingConfig

BUCKET_PARAMETERS = 5e8
"""DeepSpeed's reduce_bucket_size: parameters of one reduction."""

USABLE_MEMORY = 0.9
"""Of a device: the rest is the framework's, the allocator's and the collectives'."""

NOTABLE_SHARE = 0.2
"""A part of the step that takes more than this is said to break first."""


@dataclass(frozen=True)
class Work:
    """One phase, as far as its time depends on it.

    `config` is a config.json's dict of the model that computes. `adapters` are trained parameters beside frozen
    weights, 0 where all are trained.
    """

    config: dict[str, Any]
    sequence_tokens: int
    training: TrainingConfig
    domains: int
    evaluation_sequences: int
    adapters: int = 0
    gates: int = 0
    teacher_parameters: int = 0

    @property
    def parameters(self) -> int:
        """Of the model that computes."""
        return count_parameters(self.config)

    @property
    def batch_sequences(self) -> int:
        """Of a global batch."""
        return self.training.global_batch_tokens // self.sequence_tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, what happens every so many steps shared out. `idle`: of `compute`, without a sequence."""

    compute: float
    communication: float
    data: float
    evaluation: float
    mixture: float
    checkpoint: float
    idle: float
    tokens: int

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part; they add up to the step."""
        names = ("compute", "communication", "data", "evaluation", "mixture", "checkpoint")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Of all workers together."""
        return self.tokens / self.total


def step_time(work: Work, engine: EngineConfig, hardware: Hardware, workers: int) -> StepTime:
    """The step of a phase on so many workers. Formulas: docs/SCALING.md."""
    every = work.training
    micro_batches = math.ceil(work.batch_sequences / (workers * engine.micro_batch_sequences))
    compute = micro_batches * _pass_flops(work, engine) / hardware.flops_per_s
    useful = work.batch_sequences / (workers * micro_batches * engine.micro_batch_sequences)
    communication = _communication(work, engine, hardware, workers, micro_batches)
    if engine.zero_stage == 3:  # DeepSpeed's overlap_comm: on by default for stage 3 alone
        communication = max(0.0, communication - compute)
    served = every.global_batch_tokens / hardware.feeder_tokens_per_s
    asking = min(workers, work.batch_sequences) * hardware.feeder_message_s
    ahead = max(0.0, served + asking / STEPS_A_REQUEST - compute - communication)
    updates = 1 / (every.update_mixture_every_steps or every.evaluate_every_steps)
    saved = checkpoint_bytes(work.adapters or work.parameters, work.gates)
    gathered = saved / hardware.wire_bytes_per_s(workers) if workers > 1 else 0.0
    asked = hardware.actor_round_trip_s + workers * hardware.actor_message_s
    return StepTime(
        compute=compute,
        communication=communication,
        data=(1 - updates) * ahead + updates * (served + asking),  # what follows an update cannot be read before it
        evaluation=_evaluation(work, engine, hardware, workers) / every.evaluate_every_steps,
        mixture=asked * updates,
        checkpoint=(gathered + saved / hardware.storage_bytes_per_s) / every.checkpoint_every_steps,
        idle=(1 - useful) * compute,
        tokens=every.global_batch_tokens,
    )


def _pass_flops(work: Work, engine: EngineConfig) -> float:
    """Forward and backward of one micro-batch on one worker.

    The forward pass, which activation checkpointing makes twice, is a third of training's FLOPs.
    """
    whole = training_flops_per_token(work.config, work.sequence_tokens)
    share = (FROZEN_SHARE if work.adapters else 1) + (1 / 3 if engine.activation_checkpointing else 0)
    teacher = 2 * work.teacher_parameters
    return engine.micro_batch_sequences * work.sequence_tokens * (whole * share + teacher)


def _communication(work: Work, engine: EngineConfig, hardware: Hardware, workers: int, micro_batches: int) -> float:
    """Seconds that the collectives of one step take by themselves."""
    if workers == 1:
        return 0.0
    size, trained = DTYPE_BYTES[engine.dtype], work.adapters or work.parameters
    buckets, layers = math.ceil(trained / BUCKET_PARAMETERS), shape_of(work.config).num_layers + 1
    # parameters moved by one collective of each kind, with how many collectives they make
    reduced, gathered, weights = (trained, buckets), (trained, buckets), (work.parameters + work.adapters, layers)
    moved = {
        1: [reduced, gathered],
        2: [*[reduced] * micro_batches, gathered],
        3: [reduced, weights, weights] * micro_batches,
    }[engine.zero_stage]
    sent = size * sum(parameters for parameters, _ in moved) * (workers - 1) / workers
    count = sum(collectives for _, collectives in moved)
    return sent / hardware.wire_bytes_per_s(workers) + count * hardware.ring_latency_s(workers)


def _evaluation(work: Work, engine: EngineConfig, hardware: Hardware, workers: int) -> float:
    """Seconds of one held-out evaluation: forward passes alone, whole batches shared out over the workers."""
    batches = work.domains * math.ceil(work.evaluation_sequences / engine.micro_batch_sequences)
    tokens = engine.micro_batch_sequences * work.sequence_tokens
    compute = tokens * training_flops_per_token(work.config, work.sequence_tokens) / 3 / hardware.flops_per_s
    gather = 0.0
    if engine.zero_stage == 3 and workers > 1:
        sent = DTYPE_BYTES[engine.dtype] * work.parameters * (workers - 1) / workers
        collectives = shape_of(work.config).num_layers + 1
        gather = sent / hardware.wire_bytes_per_s(workers) + collectives * hardware.ring_latency_s(workers)
    return math.ceil(batches / workers) * max(compute, gather)


def memory_of(work: Work, engine: EngineConfig, workers: int) -> WorkerMemory:
    """Bytes on each of so many workers, by orchestrator.memory_forecast."""
    return worker_memory(
        work.parameters,
        shape_of(work.config),
        vocabulary_of(work.config),
        engine.model_copy(update={"workers": workers}),
        sequence_tokens=work.sequence_tokens,
        adapters=work.adapters,
        gates=work.gates,
        teacher_parameters=work.teacher_parameters,
    )


def breaks_first(work: Work, engine: EngineConfig, hardware: Hardware, workers: int) -> str:
    """What stands in the way of this many workers: memory, then a batch too small, then the largest other part."""
    needed, there = memory_of(work, engine, workers).total, hardware.memory_bytes
    if there is not None and needed > USABLE_MEMORY * there:
        return f"memory: {needed / 1e9:.0f} of {there / 1e9:.0f} GB"
    if work.batch_sequences < workers * engine.micro_batch_sequences:
        return f"batch: {work.batch_sequences} sequences for {workers * engine.micro_batch_sequences}"
    step = step_time(work, engine, hardware, workers)
    others = {name: seconds for name, seconds in step.parts.items() if name != "compute"} | {"uneven batch": step.idle}
    worst = max(others, key=others.__getitem__)
    if others[worst] > NOTABLE_SHARE * step.total:
        return f"{worst}: {others[worst] / step.total:.0%} of the step"
    return "nothing"


@dataclass(frozen=True)
class PhaseTime:
    """A phase on one kind of worker: its step, and hours from the first step to the last regular one."""

    hardware: Hardware
    workers: int
    step: StepTime
    hours: float
    breaks_first: str

    @property
    def worker_hours(self) -> float:
        """Hours of all workers together."""
        return self.hours * self.workers


def phase_time(work: Work, engine: EngineConfig, hardware: Hardware, workers: int) -> PhaseTime:
    """A whole phase on so many workers."""
    step = step_time(work, engine, hardware, workers)
    hours = step.total * work.training.steps / 3600
    return PhaseTime(hardware, workers, step, hours, breaks_first(work, engine, hardware, workers))
