"""What a run would do, before it does anything: stages, shapes, parameters, tokens, memory, disk, data use.

Loads neither torch nor Ray.
"""

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data_forecast import DomainUse, Supply, data_use, find_text, phases_of
from orchestrator.hardware import Hardware, hardware_for
from orchestrator.memory_forecast import DTYPE_BYTES, WorkerMemory, checkpoint_bytes
from orchestrator.preflight import preflight, supply_of
from orchestrator.recipe import Recipe
from orchestrator.run import stages_of
from orchestrator.settings_in_words import (
    distillation_in_words,
    lora_in_words,
    mixture_in_words,
    source_in_words,
)
from orchestrator.sliced_model import kept_in_words, kept_sizes, residual_parameters, slicing_in_words
from orchestrator.source_model import SourceFacts, inspect_source
from orchestrator.step_time import PhaseTime, memory_of, phase_time
from orchestrator.time_forecast import work_of
from orchestrator.workspace import Mark, Workspace, open_workspace, workspace_uri
from shearing.models.family import shape_of
from shearing.models.parameters import count_parameters, prunable_parameters
from shearing.models.shape import Shape
from shearing.pruning.target import GroupSpec, pruning_groups
from shearing.training.config import EngineConfig


@dataclass(frozen=True)
class StagePlan:
    """A stage and how far it is: `finished`, `begun` or `to run`."""

    name: str
    title: str
    state: str


@dataclass(frozen=True)
class ModelPlan:
    """One model of the run: its shape, parameters, and the bytes of its directory."""

    name: str
    shape: Shape
    parameters: int
    prunable_parameters: int
    residual_parameters: int
    directory_bytes: int


@dataclass(frozen=True)
class PhasePlan:
    """One training phase; what depends on the model's shape is None where a problem hides it."""

    name: str
    steps: int
    most_steps: int
    tokens: int
    batch_sequences: int
    accumulation_steps: float
    memory: WorkerMemory | None
    checkpoint_bytes: int | None
    times: list[PhaseTime]


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts. `problems` is what has to be mended first."""

    name: str
    workspace: str
    engine: EngineConfig
    source: str
    mixture: str
    distillation: str
    lora: str
    method: str
    stages: list[StagePlan]
    models: list[ModelPlan]
    gates: dict[str, str]
    phases: list[PhasePlan]
    supply: Supply
    use: list[DomainUse]
    problems: list[str]
    hardware: list[Hardware]


def plan(recipe: Recipe) -> Plan:
    """What a run of the recipe would do. Starts nothing and writes nothing."""
    facts = inspect_source(recipe)
    problems = preflight(recipe)
    try:
        workspace: Workspace | None = open_workspace(recipe)
    except (ValueError, OSError):
        workspace = None  # among the problems
    marks = workspace.marks() if workspace is not None else {}
    text_bytes, _ = find_text(recipe)
    supply = supply_of(recipe, workspace, text_bytes, facts) if workspace is not None else Supply({}, estimated=True)
    return Plan(
        name=recipe.name,
        workspace=workspace_uri(recipe),
        engine=recipe.engine,
        source=source_in_words(recipe.source),
        mixture=mixture_in_words(recipe.mixture),
        distillation=distillation_in_words(recipe.recovery.distillation if recipe.recovery else None),
        lora=lora_in_words(recipe.recovery.lora if recipe.recovery else None),
        method=_method(recipe),
        stages=[StagePlan(stage.name, stage.title, _state(marks.get(stage.name))) for stage in stages_of(recipe)],
        models=_models(recipe, facts),
        gates=_gates(recipe, facts),
        phases=_phases(recipe, facts),
        supply=supply,
        use=data_use(recipe, supply),
        problems=problems,
        hardware=hardware_for(recipe.engine, recipe.hardware),
    )


def _method(recipe: Recipe) -> str:
    """How the model becomes smaller, in words."""
    if recipe.slicing is not None:
        return slicing_in_words(recipe.slicing)
    assert recipe.pruning is not None
    pruning, sequences = recipe.pruning, recipe.pruning.calibration.sequences
    tolerance, text = pruning.gates.tolerance, f"{sequences:,} sequences of calibration text"
    held = "every group and layer" if not pruning.target.is_overall else "all of them together"
    words = {
        "learned": f"gates, learned in training; {held} to within {tolerance:g} of the target sparsity",
        "magnitude": "the largest weights",
        "activation": f"the largest activations, and the layers whose absence costs most, on {text}",
        "block_influence": f"the largest activations, and the layers that change their input most, on {text}",
        "random": f"at random, seed {recipe.seed}",
    }[pruning.method]
    unused = "" if pruning.method == "learned" else "; no mask learning, so pruning.steps and the like are not used"
    return f"pruning.method = {pruning.method}: {words}{unused}"


def _state(mark: Mark | None) -> str:
    if mark is None:
        return "to run"
    return "begun" if mark.finished is None else "finished"


def _models(recipe: Recipe, facts: SourceFacts) -> list[ModelPlan]:
    if facts.shape is None or facts.config is None:
        return []
    models = [_model("source", facts.config, facts.shape, recipe)]
    if facts.target is not None and recipe.pruning is not None and not recipe.pruning.target.is_overall:
        models.append(_model("target", facts.config, facts.target, recipe))
    if facts.sliced is not None and recipe.slicing is not None:
        kept = max(kept_sizes(facts.config, recipe.slicing)[:-1])
        shown = facts.shape.model_copy(update={"hidden_size": kept})
        models.append(replace(_model("sliced", facts.sliced, None, recipe), shape=shown))
    return models


def _model(name: str, config: dict[str, Any], shape: Shape | None, recipe: Recipe) -> ModelPlan:
    parameters = count_parameters(config, shape)
    return ModelPlan(
        name=name,
        shape=shape or shape_of(config),
        parameters=parameters,
        prunable_parameters=prunable_parameters(config, shape),
        residual_parameters=residual_parameters(config),
        directory_bytes=DTYPE_BYTES[recipe.engine.dtype] * parameters,
    )


def _gates(recipe: Recipe, facts: SourceFacts) -> dict[str, str]:
    if recipe.slicing is not None and facts.sliced is not None and facts.config is not None:
        return {"signals": kept_in_words(facts.config, recipe.slicing)}
    if facts.shape is None or facts.target is None or recipe.pruning is None:
        return {}
    lines = {}
    for name, spec in pruning_groups(facts.shape, recipe.pruning).items():
        where = f" in each of {spec.rows} layers" if spec.rows else ""
        goal = "" if spec.target is None else f" -> {spec.target:,}{where} (sparsity {spec.target_sparsity:.4f})"
        lines[name] = f"{spec.size:,}{goal or where}{_forced(spec)}"
    sparsity, most = recipe.pruning.target.sparsity, recipe.pruning.target.parameters
    if most is not None and facts.config is not None:
        whole = count_parameters(facts.config)
        lines["all together"] = f"{whole:,} -> at most {most:,} parameters, embeddings included; uneven layers"
    if sparsity is not None and facts.config is not None:
        whole = prunable_parameters(facts.config)
        left = f"{whole:,} -> at most {int(whole * (1 - sparsity)):,} prunable parameters (sparsity {sparsity:.4f})"
        lines["all together"] = f"{left}; layers of their own sizes"
    return lines


def _forced(spec: GroupSpec) -> str:
    parts = (("forced to stay", spec.kept), ("forced to go", spec.dropped))
    return "".join(f"; {words}: {', '.join(map(str, units))}" for words, units in parts if units)


def _phases(recipe: Recipe, facts: SourceFacts) -> list[PhasePlan]:
    plans = []
    engine, sequence_tokens = recipe.engine, recipe.corpus.sequence_tokens
    for phase in phases_of(recipe):
        work = work_of(recipe, facts, phase)
        training = phase.training
        sequences = training.global_batch_tokens // sequence_tokens
        kinds = hardware_for(engine, recipe.hardware) if work is not None else []
        plans.append(
            PhasePlan(
                name=phase.name,
                steps=training.steps,
                most_steps=training.most_steps,
                tokens=training.steps * training.global_batch_tokens,
                batch_sequences=sequences,
                accumulation_steps=sequences / (engine.most_workers * engine.micro_batch_sequences),
                memory=memory_of(work, engine, engine.least_workers) if work is not None else None,
                checkpoint_bytes=checkpoint_bytes(work.adapters or work.parameters, work.gates) if work else None,
                times=[phase_time(work, engine, kind, engine.most_workers) for kind in kinds if work is not None],
            )
        )
    return plans
