"""What a recipe's phases compute, and how long each should take, for the plan and for the report after the run."""

from typing import Any

from orchestrator.data_forecast import Phase, phases_of
from orchestrator.hardware import hardware_for
from orchestrator.memory_forecast import gate_count
from orchestrator.recipe import Recipe
from orchestrator.source_model import SourceFacts, inspect_source
from orchestrator.step_time import Work, step_time
from orchestrator.teacher_model import teacher_parameters
from shearing.models.family import resized_config
from shearing.models.parameters import adapter_sizes
from shearing.models.shape import Shape
from shearing.pruning.target import pruning_groups


def adapter_parameters(recipe: Recipe, config: dict[str, Any], shape: Shape | None) -> int:
    """Parameters of the adapters that recovery trains in the smaller model; 0 where it trains every weight."""
    lora = recipe.recovery.lora if recipe.recovery is not None else None
    return 0 if lora is None else sum(lora.rank * sum(size) for size in adapter_sizes(config, lora.targets, shape))


def work_of(recipe: Recipe, facts: SourceFacts, phase: Phase) -> Work | None:
    """What a phase computes; None where a problem hides the model."""
    whole = (facts.config, facts.shape) if facts.config is not None and facts.shape is not None else None
    trained = whole if phase.name in ("source", "pruning") else facts.result
    if trained is None or facts.shape is None:
        return None
    config, shape = trained
    masked = recipe.pruning if phase.name == "pruning" and facts.target is not None else None
    healed = phase.name == "recovery"
    return Work(
        config=config if shape is None else resized_config(config, shape, list(range(shape.num_layers))),
        sequence_tokens=recipe.corpus.sequence_tokens,
        training=phase.training,
        domains=len(recipe.corpus.domains),
        evaluation_sequences=recipe.evaluation.sequences_per_domain,
        adapters=adapter_parameters(recipe, config, shape) if healed else 0,
        gates=gate_count(pruning_groups(facts.shape, masked).values()) if masked is not None else 0,
        teacher_parameters=teacher_parameters(recipe, facts) if healed else 0,
    )


def step_forecasts(recipe: Recipe, name: str) -> dict[str, float]:
    """Seconds of a step of one phase by kind of worker, extra steps aside; empty where nothing is known."""
    facts = inspect_source(recipe)
    works = [work_of(recipe, facts, phase) for phase in phases_of(recipe) if phase.name == name]
    kinds, workers = hardware_for(recipe.engine, recipe.hardware), recipe.engine.most_workers
    return {
        kind.name: step_time(work, recipe.engine, kind, workers).total
        for work in works
        if work is not None
        for kind in kinds
    }
