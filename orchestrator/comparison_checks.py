"""What a comparison would do, and everything that can be wrong with it, before anything starts.

Loads neither torch nor Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.comparison_run import MethodRun, runs_at_once
from orchestrator.methods import (
    METHODS,
    chosen_methods,
    comparison_uri,
    method_recipe,
    misfits,
    on_source,
    planned_parameters,
)
from orchestrator.preflight import preflight
from orchestrator.recipe import ComparisonConfig, Recipe
from orchestrator.source_model import SourceFacts, inspect_source
from orchestrator.stage import recipe_conflicts
from orchestrator.stores import unreadable
from orchestrator.workspace import Workspace, open_workspace, workspace_uri
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
    not_zero: int
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
    problems = preflight(recipe.only("pruning"))
    facts = inspect_source(recipe.only("pruning"))
    text = recipe.comparison.text
    try:
        if text is not None and not _is_file(text.file):
            problems.append(
                f"comparison.text.file = {text.file!r} is no file. Set it to a text, or comparison.text=null."
            )
    except OSError as error:
        assert text is not None
        problems.append(unreadable("comparison.text.file", text.file, error))
    if facts.config is None or facts.target is None:
        return problems
    if text is not None:
        found = text.size_problems(facts.config.get("max_position_embeddings"), "the source model")
        problems += [f"comparison.text: {problem}" for problem in found]
    for name in chosen_methods(recipe, facts)[0]:
        found = misfits(name, recipe, facts) or preflight(method_recipe(name, recipe, facts.config))
        problems += [f"method {name}: {problem}" for problem in found if problem not in problems]
    try:
        for run in _known_runs(recipe, facts):
            problems += recipe_conflicts(run.stages, run.recipe, run.workspace)
    except OSError as error:
        problems.append(unreadable("workspace", workspace_uri(recipe), error))
    return problems


def plan_comparison(recipe: Recipe) -> ComparisonPlan:
    """What a comparison would do. Starts nothing and writes nothing."""
    recipe = comparison_recipe(recipe)
    problems, facts = comparison_problems(recipe), inspect_source(recipe.only("pruning"))
    names, left_out = chosen_methods(recipe, facts) if facts.target is not None else ([], {})
    states = {run.name: _state(run) for run in _known_runs(recipe, facts)}
    marks = open_workspace(recipe).marks()
    return ComparisonPlan(
        name=recipe.name,
        workspace=open_workspace(recipe).store.uri,
        source_parameters=count_parameters(facts.config) if facts.shape is not None else None,
        methods=[
            _method_plan(name, recipe, facts, states.get(name, "to run"))
            for name in names
            if not misfits(name, recipe, facts)
        ],
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
        heads = "".join(f"{head:>15}" for head in ("parameters", "not zero", "to choose", "to recover"))
        yield f"{'method':<18}{'':<24}{heads}  state"
        for method in plan.methods:
            figures = (method.parameters, method.not_zero, method.choosing_tokens, method.recovery_tokens)
            cells = "".join(f"{figure:>15,}" for figure in figures)
            yield f"  {method.name:<16}{method.title:<24}{cells}  {method.state}"
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
    parameters, not_zero = planned_parameters(derived, facts.config)
    return MethodPlan(
        name=name,
        title=METHODS[name].title,
        parameters=parameters,
        not_zero=not_zero,
        choosing_tokens=choosing_tokens(derived),
        recovery_tokens=recovery,
        state=state,
    )


def choosing_tokens(derived: Recipe) -> int:
    """Tokens that a method reads before recovery, at least: extra steps of mask learning come on top."""
    pruning = derived.pruning
    if pruning is not None and pruning.method == "learned":
        return pruning.steps * pruning.global_batch_tokens
    return calibration_sequences(derived) * derived.corpus.sequence_tokens


def calibration_sequences(derived: Recipe) -> int:
    """Sequences of text that a method measures on; 0 where it measures nothing."""
    if derived.slicing is not None:
        return derived.slicing.calibration.sequences
    if derived.sparsifying is not None:
        return derived.sparsifying.calibration.sequences if derived.sparsifying.method == "sparsegpt" else 0
    assert derived.pruning is not None
    return derived.pruning.calibration.sequences if derived.pruning.method in MEASURING else 0


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
