"""The stages of a comparison: corpus, source and references as in any run, then methods, measures and the page."""

from collections.abc import Callable
from functools import partial
from typing import Any

from orchestrator.comparison_run import methods_are_whole, run_methods
from orchestrator.methods import METHODS as COMPARED
from orchestrator.scoring_settings import task_resources
from orchestrator.stage import Context, Stage
from orchestrator.stages import CORPUS, REFERENCES, SOURCE, score_protocol, source_model
from orchestrator.workspace import fingerprint
from shearing.storage import open_store


def compared_models(context: Context) -> dict[str, str]:
    """Every model that is measured, by name: `source`, and `<method>/before` and `<method>/after`."""
    models = {"source": source_model(context)}
    for name, uri in context.outputs["methods"]["runs"].items():
        folder, method = open_store(uri), COMPARED[name]
        if method.before is not None:
            models[f"{name}/before"] = folder.child(method.before).uri
        models[f"{name}/after"] = folder.child(method.after).uri
    return models


def _measures(context: Context) -> dict[str, Any]:
    """Losses of every model sequence by sequence; size, memory and speed of the source and of each method's result."""
    from actors.comparing import measure_models
    from actors.scoring import score_models, score_tasks

    models, protocol = compared_models(context), score_protocol(context)
    comparison, resources = context.recipe.comparison, task_resources(context.recipe)
    assert comparison is not None
    text = comparison.text and comparison.text.model_copy(update={"file": open_store(comparison.text.file).uri})
    context.console.note(f"{len(models)} models on the same held-out sequences")
    losses = measure_models(models, protocol, text, **resources)
    results = {name: uri for name, uri in models.items() if not name.endswith("/before")}
    context.console.note(f"size, memory and speed of {len(results)}, speeds in turns in one process")
    scores = score_models(results, protocol, tuple(results), **resources)
    for name, entry in losses.items():
        entry |= {key: value for key, value in scores["models"].get(name, {}).items() if key not in entry}
        if tasks := comparison.tasks:
            # own task files name local data; those of the harness fetch theirs
            offline = tasks.files is not None
            here = tasks.model_copy(update={"files": open_store(tasks.files).uri if tasks.files else None})
            score = partial(score_tasks, models[name], here, protocol, offline=offline, **resources)
            entry["tasks"] = _made_once(context, f"tasks/{name}", score)
    return {"models": losses, "protocol": scores["protocol"]}


def _made_once(context: Context, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier attempt on the same inputs made and kept, or what is made and kept now."""
    store, file = context.workspace.store, f"measures/{name}.json"
    inputs = fingerprint(MEASURES.rests_on(context))
    if store.exists(file) and (kept := store.read_json(file))["inputs"] == inputs:
        context.console.note(f"{name}: measured already")
        return dict(kept["measures"])
    context.console.note(name)
    made = make()
    store.write_json(file, {"inputs": inputs, "measures": made})
    return made


def _page(context: Context) -> dict[str, Any]:
    from orchestrator.report_comparison import build_comparison

    found = build_comparison(context.workspace.store)
    context.console.note(found["verdict"])
    return {"path": context.workspace.store.child("comparison").uri, "verdict": found["verdict"]}


def _page_is_there(context: Context, _outputs: dict[str, Any]) -> bool:
    return context.workspace.store.exists("comparison/index.html")


_ALL = ("seed", "corpus", "source", "engine.dtype", "evaluation", "references", "mixture", "pruning", "recovery")

METHODS = Stage(
    name="methods",
    title="every method to the same number of parameters",
    keys=(*_ALL, "slicing", "sparsifying", "scratch", "comparison.methods"),
    after=("corpus", "source", "references"),
    run=run_methods,
    is_whole=methods_are_whole,
)
MEASURES = Stage(
    name="measures",
    title="all models by one protocol",
    keys=("evaluation", "engine.dtype", "scores", "comparison.text", "comparison.tasks"),
    after=("corpus", "source", "methods"),
    run=_measures,
)
PAGE = Stage(
    name="comparison",
    title="the methods on one page",
    keys=("name",),
    after=("corpus", "source", "references", "methods", "measures"),
    run=_page,
    is_whole=_page_is_there,
    needs_ray=False,
)
COMPARISON_STAGES = (CORPUS, SOURCE, REFERENCES, METHODS, MEASURES, PAGE)
