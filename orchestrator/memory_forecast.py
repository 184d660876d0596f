"""What a worker holds in memory during a phase, and what a checkpoint takes on disk, from closed formulas."""

from collections.abc import Iterable
from dataclasses import dataclass

from shearing.models.shape import Shape
from shearing.pruning.target import GroupSpec
from shearing.training.config import EngineConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Float32 each: value, gradient, two Adam moments, and the gate that the step drew.
BYTES_A_GATE = 20
# Weights and two Adam moments in float32; the same of a gate. The bitmap of consumed sequences is far smaller.
CHECKPOINT_BYTES_A_PARAMETER = 12


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes on one worker. An estimate: allocators, communication buffers and the framework itself come on top."""

    weights: float
    gradients: float
    optimizer: float
    gates: float
    activations: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gates + self.activations + self.teacher


FORMULAS = """\
N parameters, M of them trained (all, or adapters), W workers, b bytes of the dtype, B x T tokens of a micro-batch,
G gates
weights      b N                (ZeRO 3: / W)
gradients    b M                (ZeRO 2 and 3: / W)
optimizer    12 M / W           float32 copy and two Adam moments
gates        20 G
activations  b B T L (8 D + 2 (H + 2K) P + 4 F); with activation checkpointing b B T (L D + one layer's);
             and B T V (b + 8) for the logits, their float32 copy and its gradient
teacher      b N' + 2 b B T V   whole on every worker: its N' weights, its logits and the gradient of the divergence"""


def worker_memory(
    parameters: int,
    shape: Shape,
    vocabulary: int,
    engine: EngineConfig,
    *,
    sequence_tokens: int,
    adapters: int = 0,
    gates: int = 0,
    teacher_parameters: int = 0,
) -> WorkerMemory:
    """Bytes on each worker, with the fewest, while a model of `parameters`, or `adapters` beside them, is trained.

    By the formulas in FORMULAS.
    """
    size, workers = DTYPE_BYTES[engine.dtype], engine.least_workers
    tokens = engine.micro_batch_sequences * sequence_tokens
    attention = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size
    a_layer = size * tokens * (8 * shape.hidden_size + attention + 4 * shape.intermediate_size)
    layers = shape.num_layers * a_layer
    if engine.activation_checkpointing:
        layers = shape.num_layers * size * tokens * shape.hidden_size + a_layer
    trained = adapters or parameters
    return WorkerMemory(
        weights=size * (parameters + adapters) / (workers if engine.zero_stage == 3 else 1),
        gradients=size * trained / (workers if engine.zero_stage >= 2 else 1),
        optimizer=12 * trained / workers,
        gates=BYTES_A_GATE * gates,
        activations=layers + tokens * vocabulary * (size + 8),
        teacher=size * (teacher_parameters + 2 * tokens * vocabulary) if teacher_parameters else 0.0,
    )


def gate_count(groups: Iterable[GroupSpec]) -> int:
    """Gates in all groups together."""
    return sum(group.size * (group.rows or 1) for group in groups)


def checkpoint_bytes(trained: int, gates: int = 0) -> int:
    """Bytes of one training checkpoint on disk, which holds the parameters that are trained."""
    return CHECKPOINT_BYTES_A_PARAMETER * (trained + gates)
