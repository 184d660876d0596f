"""The calibration text of a run as plain values for the workers that hold it."""

from actors.calibration import CalibrationSettings
from orchestrator.phases import proportions
from orchestrator.stage import Context
from orchestrator.stages import source_model


def calibration_settings(context: Context, sequences: int) -> CalibrationSettings:
    """So many sequences of the run's corpus, through its source model."""
    recipe = context.recipe
    return CalibrationSettings(
        source=source_model(context),
        corpus=context.outputs["corpus"]["path"],
        proportions=proportions(recipe),
        sequences=sequences,
        engine=recipe.engine,
        seed=recipe.seed,
    )
