"""The tables of docs/SCALING.md: the published recipe on larger sources and on more GPUs, on paper."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.hardware import ETHERNET_NODE_BYTES_PER_S, GPUS, Hardware
from orchestrator.step_time import PhaseTime, Work, phase_time
from shearing.models.family import llama_config
from shearing.models.shape import Shape
from shearing.training.config import EngineConfig, TrainingConfig

VOCABULARY, SEQUENCE_TOKENS, DOMAINS, EVALUATION_SEQUENCES = 32_000, 4096, 7, 500
PRUNING = TrainingConfig(steps=3200, global_batch_tokens=131_072, evaluate_every_steps=50, checkpoint_every_steps=200)
RECOVERY = TrainingConfig(
    steps=48_000, global_batch_tokens=1_048_576, evaluate_every_steps=400, checkpoint_every_steps=500
)
ENGINE = EngineConfig(
    workers=8, gpus_per_worker=1, zero_stage=3, dtype="bfloat16", micro_batch_sequences=1, activation_checkpointing=True
)
WORKERS = (8, 32, 64, 128, 256, 1024)


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> Shape:
    return Shape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=128,
        intermediate_size=intermediate,
    )


SOURCES = {
    "7B": _shape(32, 4096, 32, 32, 11_008),
    "13B": _shape(40, 5120, 40, 40, 13_824),
    "70B": _shape(80, 8192, 64, 8, 28_672),
}
"""Llama 2's (arXiv 2307.09288)."""

TARGETS = {
    "1.3B": _shape(24, 2048, 16, 16, 5504),
    "2.7B": _shape(32, 2560, 20, 20, 6912),
    "7B": _shape(32, 4096, 32, 8, 11_008),
}
"""Sheared-LLaMA's two (arXiv 2310.06694, table 7), and a 7B with the eight key/value heads of the 70B source."""


@dataclass(frozen=True)
class Case:
    """One phase of one model."""

    title: str
    work: Work


def _work(shape: Shape, training: TrainingConfig, gates: int = 0) -> Work:
    config = llama_config(shape, VOCABULARY, SEQUENCE_TOKENS)
    return Work(config, SEQUENCE_TOKENS, training, DOMAINS, EVALUATION_SEQUENCES, gates=gates)


def gate_total(shape: Shape) -> int:
    """Gates of mask learning on layers, hidden dimensions, heads (by key/value group where shared) and units."""
    return shape.num_layers * (1 + shape.num_heads + shape.intermediate_size) + shape.hidden_size


def cases() -> dict[str, Case]:
    """The phases of the page, by the name of their table."""
    found = {
        f"pruning-{name}": Case(f"mask learning of {name}", _work(shape, PRUNING, gate_total(shape)))
        for name, shape in SOURCES.items()
    }
    return found | {
        f"recovery-{name}": Case(f"recovery of {name}", _work(shape, RECOVERY)) for name, shape in TARGETS.items()
    }


def tables() -> dict[str, str]:
    """Every table of the page as Markdown, by its name there."""
    found = {name: _by_workers(case.work) for name, case in cases().items()}
    return found | {"devices": _by_device(), "stages": _by_stage(), "batch": _by_batch()}


def _by_workers(work: Work) -> str:
    rows = [_row(str(count), phase_time(work, ENGINE, GPUS["H100"], count)) for count in WORKERS]
    return _table("GPUs", rows)


def _by_device() -> str:
    work = cases()["pruning-7B"].work
    kinds = [*GPUS.values(), ethernet(GPUS["H100"])]
    return _table("16 of", [_row(kind.name, phase_time(work, ENGINE, kind, 16)) for kind in kinds])


def _by_stage() -> str:
    work, rows = cases()["recovery-1.3B"].work, []
    for kind in (GPUS["H100"], ethernet(GPUS["H100"])):
        for stage in (1, 2, 3):
            engine = ENGINE.model_copy(update={"zero_stage": stage})
            rows.append(_row(f"ZeRO {stage}, {kind.name}", phase_time(work, engine, kind, 64)))
    return _table("64 GPUs", rows)


def _by_batch() -> str:
    rows = []
    for batch_tokens in (131_072, 524_288, 1_048_576):
        steps = PRUNING.steps * PRUNING.global_batch_tokens // batch_tokens
        training = PRUNING.model_copy(
            update={"global_batch_tokens": batch_tokens, "steps": steps, "evaluate_every_steps": max(1, steps // 64)}
        )
        work = replace(cases()["pruning-70B"].work, training=training)
        rows.append(_row(f"{batch_tokens:,} tokens", phase_time(work, ENGINE, GPUS["H100"], 256)))
    return _table("256 GPUs, a batch of", rows)


def ethernet(hardware: Hardware) -> Hardware:
    """The same nodes on a network of 100 Gbit/s a node."""
    return replace(hardware, name=f"{hardware.name}, Ethernet", node_bytes_per_s=ETHERNET_NODE_BYTES_PER_S)


def _row(name: str, time: PhaseTime) -> list[str]:
    step = time.step
    shares = [f"{100 * (seconds / step.total):.0f}" for seconds in step.parts.values()]
    speed, hours = f"{step.tokens_per_s:,.0f}", f"{time.hours:,.1f}"
    return [name, f"{step.total:.2f}", *shares, speed, hours, f"{time.worker_hours:,.0f}", time.breaks_first]


def _table(first: str, rows: list[list[str]]) -> str:
    head = [first, "step, s", "compute %", "commun. %", "data %", "eval. %", "mixture %", "checkp. %", "tokens/s"]
    head += ["hours", "GPU-hours", "in the way"]
    return "\n".join(_lines([head, ["---"] + ["---:"] * (len(head) - 2) + ["---"], *rows]))


def _lines(rows: list[list[str]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(row)} |"
