"""A plan as text for a terminal."""

from collections.abc import Iterator

from orchestrator.data_forecast import DomainUse
from orchestrator.hardware import CPU_CORE, GPUS, SOURCES, Hardware
from orchestrator.memory_forecast import FORMULAS
from orchestrator.plan import Plan
from shearing.models.shape import Shape

KEPT_CHECKPOINTS = 2


def render_plan(plan: Plan) -> str:
    """The whole plan, problems last."""
    return "\n".join(_lines(plan)) + "\n"


def format_bytes(size: float) -> str:
    """Bytes with a binary unit: `512 B`, `1.5 MiB`, `26.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _lines(plan: Plan) -> Iterator[str]:
    yield f"run {plan.name} in {plan.workspace}"
    yield ""
    yield "stages"
    for number, stage in enumerate(plan.stages, start=1):
        yield f"  {number}. {stage.name:<11} {stage.title:<42} {stage.state}"
    yield ""
    yield from _model_lines(plan)
    yield from _phase_lines(plan)
    yield from _time_lines(plan)
    yield f"source        {plan.source}"
    yield f"mixture       {plan.mixture}"
    yield f"distillation  {plan.distillation}"
    yield f"LoRA          {plan.lora}"
    yield ""
    yield from _data_lines(plan)
    if plan.problems:
        yield "to be mended before it can run"
        for problem in plan.problems:
            yield "  - " + problem.replace("\n", "\n    ")
    else:
        yield "nothing is missing: run it without --plan"


def _model_lines(plan: Plan) -> Iterator[str]:
    if not plan.models:
        return
    yield "models                " + "".join(f"{model.name:>16}" for model in plan.models)
    for name in Shape.model_fields:
        yield f"  {name:<20}" + "".join(f"{getattr(model.shape, name):>16,}" for model in plan.models)
    yield "  parameters          " + "".join(f"{model.parameters:>16,}" for model in plan.models)
    yield "  prunable            " + "".join(f"{model.prunable_parameters:>16,}" for model in plan.models)
    if any(model.residual_parameters for model in plan.models):
        yield "  residual matrices   " + "".join(f"{model.residual_parameters:>16,}" for model in plan.models)
    yield "  directory on disk   " + "".join(f"{format_bytes(model.directory_bytes):>16}" for model in plan.models)
    yield ""
    if plan.gates:
        yield "what stays"
        yield f"  {plan.method}"
        for name, text in plan.gates.items():
            yield f"  {name:<15} {text}"
        yield ""


def _phase_lines(plan: Plan) -> Iterator[str]:
    yield "training          steps           tokens   batch   accumulated   a checkpoint   memory a worker"
    for phase in plan.phases:
        memory = format_bytes(phase.memory.total) if phase.memory else "?"
        disk = format_bytes(phase.checkpoint_bytes) if phase.checkpoint_bytes is not None else "?"
        yield (
            f"  {phase.name:<10} {phase.steps:>10,} {phase.tokens:>16,} {phase.batch_sequences:>7,} "
            f"{phase.accumulation_steps:>13g} {disk:>14} {memory:>17}"
        )
    engine = plan.engine
    per_worker = f"{engine.cpus_per_worker:g} CPUs and {engine.gpus_per_worker:g} GPUs"
    least, most = engine.least_workers, engine.most_workers
    count = f"{most}" if least == most else f"{least} to {most}"
    yield (
        f"  on {count} workers of {per_worker} each, ZeRO {engine.zero_stage}, {engine.dtype}, "
        f"{engine.micro_batch_sequences} sequences a forward pass"
    )
    yield f"  (batch in sequences; each phase keeps {KEPT_CHECKPOINTS} checkpoints)"
    for phase in plan.phases:
        if phase.most_steps > phase.steps:
            extra = phase.most_steps - phase.steps
            yield f"  {phase.name} goes on for at most {extra:,} steps more, until its gates are within tolerance"
    yield ""
    known = [phase for phase in plan.phases if phase.memory is not None]
    if known:
        yield "memory a worker, estimated       weights   gradients   optimizer       gates   activations     teacher"
        for phase in known:
            held = phase.memory
            assert held is not None
            parts = (held.weights, held.gradients, held.optimizer, held.gates)
            cells = "".join(f"{format_bytes(part):>12}" for part in parts)
            teacher = format_bytes(held.teacher) if held.teacher else "none"
            yield f"  {phase.name:<26}{cells}{format_bytes(held.activations):>14}{teacher:>12}"
        yield from (f"    {line}" for line in FORMULAS.splitlines())
        yield ""


def _time_lines(plan: Plan) -> Iterator[str]:
    if not plan.hardware:
        kind = "GPU" if plan.engine.gpus_per_worker else "CPU"
        yield f"time            not known: no constant for {plan.engine.dtype} on a {kind}"
        yield ""
        return
    rows = [(phase.name, time) for phase in plan.phases for time in phase.times]
    if not rows:
        if plan.phases:
            yield "time            not known: the source's shape is not; its config.json alone would tell"
            yield ""
        return
    yield "time, forecast          device  step, s      tokens/s       hours  device-hours   what stands in the way"
    for name, time in rows:
        yield (
            f"  {name:<10} {time.hardware.name:>17} {time.step.total:>8.3g} {time.step.tokens_per_s:>13,.0f} "
            f"{time.hours:>11.2f} {time.worker_hours:>13,.2f}   {time.breaks_first}"
        )
    yield f"  with {rows[0][1].workers} workers, regular steps alone, by the formulas of docs/SCALING.md from"
    yield from _constant_lines(plan.hardware)
    yield ""


def _constant_lines(kinds: list[Hardware]) -> Iterator[str]:
    """What the forecast rests on that no data sheet says."""
    first = kinds[0]
    if first.name not in GPUS:
        yield f"    {first.flops_per_s / 1e9:.3g} GFLOPs a second a worker, as the quickstart reached (DIARY.md)"
    else:
        yield f"    {first.achieved_share:.0%} of the peak that data sheets give: {_source(first, 'achieved_share')}"
    yield f"    storage {first.storage_bytes_per_s / 1e9:g} GB/s: {_source(first, 'storage_bytes_per_s')}"
    yield f"    streams {first.feeder_tokens_per_s:,.0f} tokens/s: {_source(first, 'feeder_tokens_per_s')}"
    yield "    other constants: orchestrator/hardware.py; yours in the recipe's section `hardware`"


def _source(kind: Hardware, key: str) -> str:
    known = next((gpu for gpu in GPUS.values() if gpu.name == kind.name), CPU_CORE)
    return SOURCES[key] if getattr(kind, key) == getattr(known, key) else "the recipe's"


def _data_lines(plan: Plan) -> Iterator[str]:
    if not plan.use:
        return
    label = (
        "estimated from file sizes, good to a factor of two" if plan.supply.estimated else "from the prepared corpus"
    )
    yield f"data at the prior proportions, extra steps included: sequences drawn / there = epochs ({label})"
    phases = list(dict.fromkeys(use.phase.name for use in plan.use))
    width = max(10, *(len(use.domain) for use in plan.use))
    yield " " * (width + 2) + "".join(f"{phase:>30}" for phase in phases)
    for domain in dict.fromkeys(use.domain for use in plan.use):
        cells = [
            _use_cell(use) for phase in phases for use in plan.use if (use.domain, use.phase.name) == (domain, phase)
        ]
        yield f"  {domain:<{width}}" + "".join(f"{cell:>30}" for cell in cells)
    yield ""


def _use_cell(use: DomainUse) -> str:
    return f"{use.drawn:,.0f} / {use.sequences:,.0f} = {use.epochs:.2f}"
