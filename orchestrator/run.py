"""One run from its recipe to its report: the list of stages, and the loop over them."""

from collections.abc import Sequence

from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.recipe import Recipe
from orchestrator.stage import Context, Stage, recipe_conflicts, run_stage
from orchestrator.stages import (
    CORPUS,
    EXTRACTION,
    PRUNING,
    RECOVERY,
    REFERENCES,
    REPORT,
    SCORES,
    SCRATCH,
    SLICING,
    SOURCE,
    SPARSIFYING,
)
from orchestrator.workspace import open_workspace
from orchestrator.workspace_lock import lock_workspace
from shearing.errors import UserError

STAGES = (CORPUS, SOURCE, REFERENCES, PRUNING, EXTRACTION, SLICING, SPARSIFYING, RECOVERY, SCRATCH, SCORES, REPORT)
# Stages that a run has only where its recipe has a section.
ASKED_BY = {
    "pruning": "pruning",
    "extraction": "pruning",
    "slicing": "slicing",
    "sparsifying": "sparsifying",
    "recovery": "recovery",
    "scratch": "scratch",
}


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe asks for, in order."""
    absent = {name for name, section in ASKED_BY.items() if getattr(recipe, section) is None}
    return [stage for stage in STAGES if stage.name not in absent]


def run_recipe(recipe: Recipe, console: Console, session: RaySession, stages: Sequence[Stage] | None = None) -> Context:
    """Bring every stage of a recipe to its end; finished ones are skipped. Returns the context with all outputs.

    Args:
        recipe: What to run.
        console: Told what goes on.
        session: Ray, started when the first stage needs it.
        stages: These in place of all that the recipe asks for.

    Raises UserError for what the user can mend, Ray's and the stages' own errors otherwise. Running again after any
    stop goes on where it stopped.
    """
    workspace = open_workspace(recipe)
    with lock_workspace(workspace.store, console.note), session:
        context = Context(recipe, workspace, console, session)
        stages = list(stages_of(recipe) if stages is None else stages)
        if conflicts := recipe_conflicts(stages, recipe, workspace):
            raise UserError(conflicts)
        workspace.record(recipe, [stage.name for stage in stages])
        for number, stage in enumerate(stages, start=1):
            console.stage(stage.name, number, len(stages), stage.title)
            mark = run_stage(stage, context)
            context.outputs[stage.name] = mark.outputs
            context.fingerprints[stage.name] = mark.fingerprint
        return context
