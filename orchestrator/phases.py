"""What a recipe means for its phases: settings of training, choosing and export, as plain values for the workers."""

from typing import Any

from orchestrator.recipe import Recipe
from shearing.storage import open_store
from shearing.training.choosing import ChoosingConfig
from shearing.training.config import RecoveryConfig, TrainingConfig
from shearing.training.export import ExportConfig
from shearing.training.phase import PhaseConfig, PhaseName


def phase_config(
    recipe: Recipe, name: PhaseName, *, model: str, source: str, corpus: str, references: dict[str, float]
) -> PhaseConfig:
    """One phase of training.

    Args:
        recipe: Of the run.
        name: Which phase. `source` and `scratch` start from a shape alone, with fresh weights.
        model: Directory that it starts from.
        source: The source model's, the teacher unless the recipe names another.
        corpus: The prepared corpus' URI.
        references: Reference loss by domain; none where nothing can steer the mixture yet.
    """
    training = training_config(recipe, name)
    distillation = training.distillation if isinstance(training, RecoveryConfig) and name == "recovery" else None
    if distillation is not None:  # a worker's working directory may be another
        distillation = distillation.model_copy(update={"teacher": open_store(distillation.teacher or source).uri})
    return PhaseConfig(
        name=name,
        model=model,
        fresh=name in ("source", "scratch"),
        trust_remote_code=recipe.source.trust_remote_code,
        training=training,
        engine=recipe.engine,
        evaluation=recipe.evaluation,
        corpus=corpus,
        split="prune" if name == "pruning" else "train",
        proportions=proportions(recipe),
        mixture=recipe.mixture if references else recipe.mixture.unsteered(),
        references=references,
        watchdog=recipe.watchdog,
        seed=recipe.seed,
        distillation=distillation,
        keep_zeros=name == "recovery" and recipe.sparsifying is not None,
        lora=recipe.recovery.lora if recipe.recovery is not None and name == "recovery" else None,
        trackers=recipe.trackers,
    )


def training_config(recipe: Recipe, name: PhaseName) -> TrainingConfig:
    """The schedule of a phase: the section of the recipe that it has; for `scratch` recovery's with its own start."""
    if name == "source":
        assert recipe.source.train is not None
        return TrainingConfig.model_validate(recipe.source.train.model_dump(include=set(TrainingConfig.model_fields)))
    if name == "pruning":
        assert recipe.pruning is not None
        return recipe.pruning
    assert recipe.recovery is not None
    changed: dict[str, Any] = {}
    if name == "scratch" and recipe.scratch is not None:
        changed = recipe.scratch.model_dump(exclude_none=True)
    if name == "recovery" and recipe.recovery.lora is not None:
        changed = {"learning_rate": recipe.recovery.lora.learning_rate}
    return recipe.recovery.model_copy(update=changed)


def choosing_config(recipe: Recipe, *, source: str, destination: str, corpus: str) -> ChoosingConfig:
    """Choosing units of a source model at once; directories and the corpus by path or URI."""
    assert recipe.pruning is not None
    return ChoosingConfig(
        source=source,
        destination=destination,
        corpus=corpus,
        proportions=proportions(recipe),
        batch_sequences=recipe.engine.micro_batch_sequences,
        dtype=recipe.engine.dtype,
        trust_remote_code=recipe.source.trust_remote_code,
        pruning=recipe.pruning,
        seed=recipe.seed,
    )


def export_config(recipe: Recipe, *, checkpoint: str, source: str, destination: str, corpus: str) -> ExportConfig:
    """A model out of a phase's checkpoint; `source` is the directory whose shape and tokenizer it has."""
    return ExportConfig(
        checkpoint=checkpoint,
        source=source,
        destination=destination,
        corpus=corpus,
        sequences_per_domain=recipe.evaluation.sequences_per_domain,
        batch_sequences=recipe.engine.micro_batch_sequences,
        dtype=recipe.engine.dtype,
        trust_remote_code=recipe.source.trust_remote_code,
    )


def proportions(recipe: Recipe) -> dict[str, float]:
    """The prior proportions, scaled to 1."""
    total = sum(domain.proportion for domain in recipe.corpus.domains.values())
    return {name: domain.proportion / total for name, domain in recipe.corpus.domains.items()}
