"""What a comparison would do, and everything that can be wrong with it, before anything starts.

Loads neither torch nor Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.comparison_run import MethodRun, runs_at_once
from orchestrator.methods import METHODS, chosen_methods, comparison_uri, method_recipe, misfits, on_source
from orchestrator.preflight import preflight
from orchestrator.recipe import ComparisonConfig, Recipe
from orchestrator.source_model import SourceFacts, inspect_source, result_parameters
from orchestrator.stage import recipe_conflicts
from orchestrator.workspace import Workspace, open_workspace
from shearing.models.parameters import count_parameters
from shearing.storage import open_store

MEASURING = ("activation", "block_influence")
"""Ways to choose that read calibration text."""


@dataclass(frozen=True)
class MethodPlan:
    """What one method would do. Tokens are those that it reads; `state` says how far its run is."""

    name: str
    title: str
    parameters: int
    choosing_tokens: int
    recovery_tokens: int
    state: str


@dataclass(frozen=True)
class ComparisonPlan:
    """All that is known of a comparison before it starts. `problems` is what has to be mended first."""

    name: str
    workspace: str
    source_parameters: int | None
    methods: list[MethodPlan]
    left_out: dict[str, str]
    at_once: int
    base: dict[str, str]
    problems: list[str]


def comparison_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the comparison itself: its folder, and the defaults of its section."""
    return recipe.model_copy(
        update={"workspace": comparison_uri(recipe), "comparison": recipe.comparison or ComparisonConfig()}
    )


def comparison_problems(recipe: Recipe) -> list[str]:
    """Every problem of a comparison and of its methods, each a complete message.

    Args:
        recipe: As `comparison_recipe` gives it.
    """
    assert recipe.pruning is not None
    assert recipe.comparison is not None
    if recipe.pruning.target.is_overall:
        return [
            "pruning.target gives no sizes, but a comparison counts every method against the parameters of a target "
            "shape; allowed: sizes. Set pruning.target={num_layers: ..., hidden_size: ..., ...}."
        ]
    problems = preflight(recipe)
    facts = inspect_source(recipe)
    text = recipe.comparison.text
    if text is not None and not _is_file(text.file):
        problems.append(f"comparison.text.file = {text.file!r} is no file. Set it to a text, or comparison.text=null.")
    if facts.config is None or facts.target is None:
        return problems
    for name in chosen_methods(recipe, facts)[0]:
        found = (
            preflight(method_recipe(name, recipe, facts.config))
            if not misfits(name, recipe, facts)
            else (misfits(name, recipe, facts))
        )
        problems += [f"method {name}: {problem}" for problem in found if problem not in problems]
    for run in _known_runs(recipe, facts):
        problems += recipe_conflicts(run.stages, run.recipe, run.workspace)
    return problems


def plan_comparison(recipe: Recipe) -> ComparisonPlan:
    """What a comparison would do. Starts nothing and writes nothing."""
    recipe = comparison_recipe(recipe)
    problems, facts = comparison_problems(recipe), inspect_source(recipe)
    names, left_out = chosen_methods(recipe, facts) if facts.target is not None else ([], {})
    states = {run.name: _state(run) for run in _known_runs(recipe, facts)}
    marks = open_workspace(recipe).marks()
    return ComparisonPlan(
        name=recipe.name,
        workspace=open_workspace(recipe).store.uri,
        source_parameters=count_parameters(facts.config) if facts.shape is not None else None,
        methods=[_method_plan(name, recipe, facts, states.get(name, "to run")) for name in names],
        left_out=left_out,
        at_once=min(max(1, len(names)), runs_at_once(recipe, None)),
        base={
            name: "to run" if name not in marks else "begun" if marks[name].finished is None else "finished"
            for name in ("corpus", "source", "references", "methods", "measures", "comparison")
        },
        problems=problems,
    )


def render_comparison_plan(plan: ComparisonPlan) -> str:
    """The plan as text for a terminal, problems last."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: ComparisonPlan) -> Iterator[str]:
    yield f"comparison {plan.name} in {plan.workspace}"
    yield ""
    yield "stages           " + ", ".join(f"{name} {state}" for name, state in plan.base.items())
    if plan.source_parameters is not None:
        yield f"source           {plan.source_parameters:,} parameters"
    yield f"at a time        {plan.at_once} on this machine alone; on a cluster as many as it holds"
    yield ""
    if plan.methods:
        yield f"{'method':<18}{'':<28}{'parameters':>14}{'to choose':>14}{'to recover':>14}  state"
        for method in plan.methods:
            tokens = f"{method.choosing_tokens:>14,}{method.recovery_tokens:>14,}"
            yield f"  {method.name:<16}{method.title:<28}{method.parameters:>14,}{tokens}  {method.state}"
        yield "  (parameters at most, embeddings included; the rest in tokens)"
        yield ""
    for name, reason in plan.left_out.items():
        yield f"left out: {name}: {reason}"
    if plan.problems:
        yield "to be mended before it can run"
        for problem in plan.problems:
            yield "  - " + problem.replace("\n", "\n    ")
    else:
        yield "nothing is missing: run it without --plan"


def _method_plan(name: str, recipe: Recipe, facts: SourceFacts, state: str) -> MethodPlan:
    derived = method_recipe(name, recipe, facts.config)
    assert derived.recovery is not None
    assert facts.config is not None
    recovery = derived.recovery.steps * derived.recovery.global_batch_tokens
    parameters = result_parameters(derived, facts.config)
    return MethodPlan(name, METHODS[name].title, parameters, choosing_tokens(derived), recovery, state)


def choosing_tokens(derived: Recipe) -> int:
    """Tokens that a method reads before recovery, at least: extra steps of mask learning come on top."""
    pruning = derived.pruning
    assert pruning is not None
    if pruning.method == "learned":
        return pruning.steps * pruning.global_batch_tokens
    if pruning.method in MEASURING:
        return pruning.calibration.sequences * derived.corpus.sequence_tokens
    return 0


def _known_runs(recipe: Recipe, facts: SourceFacts) -> list[MethodRun]:
    """The methods' runs where what they start from is known already: they can have begun only then."""
    workspace: Workspace = open_workspace(recipe)
    source, references = workspace.mark("source"), workspace.mark("references")
    if facts.target is None or source is None or references is None or references.finished is None:
        return []
    base, losses = workspace.store.uri, references.outputs["losses"]
    names, _ = chosen_methods(recipe, facts)
    return [
        MethodRun(
            name, on_source(name, method_recipe(name, recipe, facts.config), base, source.outputs["model"], losses)
        )
        for name in names
        if not misfits(name, recipe, facts)
    ]


def _state(run: MethodRun) -> str:
    marks = run.workspace.marks()
    done = [stage.name for stage in run.stages if stage.name in marks and marks[stage.name].finished is not None]
    if len(done) == len(run.stages):
        return "finished"
    begun = [stage.name for stage in run.stages if stage.name in marks and stage.name not in done]
    return f"{len(done)} of {len(run.stages)} stages" + (f", in {begun[0]}" if begun else "") if marks else "to run"


def _is_file(uri: str) -> bool:
    store = open_store(uri)
    return bool(store.filesystem.get_file_info(store.path).is_file)
