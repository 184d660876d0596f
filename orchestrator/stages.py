"""The stages of a run: what each rests on, and the bodies that are no training.

Importing this loads neither torch nor Ray: a body imports what it needs when it runs.
"""

from typing import Any

from orchestrator.named_files import model_contents
from orchestrator.recipe import Recipe
from orchestrator.scoring_settings import protocol_of, task_resources
from orchestrator.source_model import result_parameters
from orchestrator.stage import Context, Stage
from orchestrator.workspace import fingerprint
from shearing.data.manifest import MANIFEST_NAME
from shearing.errors import UserError
from shearing.storage import open_store

_BASE = ("seed", "corpus", "source", "engine.dtype", "evaluation")


def _corpus(context: Context) -> dict[str, Any]:
    from actors.corpus import prepare_corpus

    recipe = context.recipe
    if recipe.source.train is not None:
        from shearing.data.tokenizer_training import ensure_trained_tokenizer

        context.console.note(f"learning a tokenizer of {recipe.source.train.tokenizer.vocab_size:,} tokens")
        tokenizer_dir = ensure_trained_tokenizer(recipe.corpus, recipe.source.train.tokenizer)
    else:
        assert recipe.source.model is not None, "preflight lets exactly one of model and train through"
        tokenizer_dir = recipe.source.model
    store, manifest = prepare_corpus(recipe.corpus, tokenizer_dir, context.console.note)
    sequences = {name: sum(split.sequences for split in splits.values()) for name, splits in manifest.domains.items()}
    listed = ", ".join(f"{name} {count:,}" for name, count in sequences.items())
    context.console.note(f"sequences of {manifest.sequence_tokens:,} tokens: {listed}")
    if manifest.malformed_lines:
        context.console.warn(f"{manifest.malformed_lines:,} of {manifest.lines:,} lines were malformed and left out")
    return {"path": store.uri, "fingerprint": manifest.fingerprint, "sequences": sequences}


def _corpus_is_whole(_context: Context, outputs: dict[str, Any]) -> bool:
    return open_store(outputs["path"]).exists(MANIFEST_NAME)


def _source(context: Context) -> dict[str, Any]:
    """The source model: the directory that the recipe names, known by its files, or trained."""
    named = context.recipe.source.model
    if named is not None:
        context.console.note(f"named by the recipe: {named}")
        store = open_store(named)
        files = model_contents(store)
        return {"model": store.uri, "files": files, "fingerprint": fingerprint(files)}
    from orchestrator.training_stages import run_source

    return run_source(context)


def _references(context: Context) -> dict[str, Any]:
    """Reference losses: measured of the source model, or loaded and, for a scaling law, fitted to the target's size."""
    references, domains = context.recipe.references, list(context.recipe.corpus.domains)
    if references.kind == "source":
        from actors.held_out_losses import measure_losses

        measured = measure_losses(source_model(context), score_protocol(context), **task_resources(context.recipe))
        losses, warnings, errors = {name: measured[name] for name in domains}, [], {}
    else:
        from shearing.data.references import load_references
        from shearing.models.loading import read_config

        parameters = result_parameters(context.recipe, read_config(source_model(context)))
        found = load_references(references, domains, parameters)
        losses, warnings, errors = found.losses, found.warnings, found.standard_errors
    for warning in warnings:
        context.console.warn(warning)
    spread = {name: f" ± {error:.4f}" for name, error in errors.items()}
    shown = ", ".join(f"{name} {loss:.4f}{spread.get(name, '')}" for name, loss in losses.items())
    context.console.note(f"nats a token: {shown}")
    return {"kind": references.kind, "losses": losses, "warnings": warnings, "standard_errors": errors}


def _pruning(context: Context) -> dict[str, Any]:
    from orchestrator.training_stages import run_pruning

    return run_pruning(context)


def _extraction(context: Context) -> dict[str, Any]:
    from orchestrator.training_stages import run_extraction

    return run_extraction(context)


def _slicing(context: Context) -> dict[str, Any]:
    from orchestrator.slicing_stage import run_slicing

    return run_slicing(context)


def _sparsifying(context: Context) -> dict[str, Any]:
    from orchestrator.sparsifying_stage import run_sparsifying

    return run_sparsifying(context)


def _recovery(context: Context) -> dict[str, Any]:
    from orchestrator.training_stages import run_recovery

    return run_recovery(context)


def _scratch(context: Context) -> dict[str, Any]:
    from orchestrator.training_stages import run_scratch

    return run_scratch(context)


def _scores(context: Context) -> dict[str, Any]:
    """Losses, sizes and speeds of every model of the run, by one protocol."""
    from actors.scoring import score_models

    store, smaller = context.workspace.store, smaller_folder(context.recipe)
    models = {"source": source_model(context), smaller: store.child(smaller).uri}
    for stage, name, folder in (("recovery", "recovered", "model"), ("scratch", "scratch", "scratch")):
        if stage in context.outputs:
            models[name] = store.child(folder).uri
    result = "recovered" if "recovered" in models else smaller
    scores = score_models(models, score_protocol(context), ("source", result), **task_resources(context.recipe))
    for name, entry in scores["models"].items():
        context.console.note(
            f"{name}: {entry['parameters']:,} parameters, mean loss {entry['mean_loss']:.4f} nats a token"
        )
    return scores


def _report(context: Context) -> dict[str, Any]:
    from orchestrator.report import build_report

    build_report(context.workspace.store)
    return {"path": context.workspace.store.child("report").uri}


def source_model(context: Context) -> str:
    """Where the source model lies: what the recipe names, or what the stage `source` trained."""
    return str(context.outputs["source"]["model"])


def smaller_folder(recipe: Recipe) -> str:
    """Folder of the run that holds the smaller model before its recovery."""
    if recipe.sparsifying is not None:
        return "sparse"
    return "pruned" if recipe.slicing is None else "sliced"


def score_protocol(context: Context) -> Any:
    """How every model of this run is scored."""
    return protocol_of(context.recipe, context.outputs["corpus"]["path"])


def _holds(file: str) -> Any:
    return lambda context, _outputs: context.workspace.store.exists(file)


def _source_is_whole(context: Context, outputs: dict[str, Any]) -> bool:
    """Raises UserError where a named model is not the one that the run began with."""
    store, before = open_store(outputs["model"]), outputs.get("files")  # none where the run trained it
    if before is None:
        return store.exists("config.json")
    now = model_contents(store)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise UserError(
            f"source.model = {context.recipe.source.model!r} is not what it was when this run began: "
            f"{', '.join(changed)} changed, came or went. Put the model back, or give this run its own folder with "
            "workspace=..."
        )
    return True


SIZE_KEYS = ("fraction", "hidden_size", "schedule", "head", "rotation")  # of slicing: what the result's size rests on
_STEERED = (*_BASE, "references", "mixture")

CORPUS = Stage(
    name="corpus",
    title="text to sequences",
    keys=("corpus", "source.model", "source.train.tokenizer"),
    after=(),
    run=_corpus,
    is_whole=_corpus_is_whole,
)
SOURCE = Stage(
    name="source",
    title="the model to start from",
    keys=_BASE,
    after=("corpus",),
    run=_source,
    is_whole=_source_is_whole,
    resumes=True,
)
REFERENCES = Stage(
    name="references",
    title="the loss each domain should come down to",
    keys=(*_BASE, "references", "pruning.target", *(f"slicing.{key}" for key in SIZE_KEYS)),
    after=("corpus", "source"),
    run=_references,
)
PRUNING = Stage(
    name="pruning",
    title="choosing what to keep",
    keys=(*_STEERED, "pruning"),
    after=("corpus", "source", "references"),
    run=_pruning,
    resumes=True,
)
EXTRACTION = Stage(
    name="extraction",
    title="a plain model of what was kept",
    keys=(*_STEERED, "pruning"),
    after=("source", "pruning"),
    run=_extraction,
    is_whole=_holds("pruned/config.json"),
)
SLICING = Stage(
    name="slicing",
    title="rotated and sliced, layer by layer",
    keys=("seed", "corpus", "source", "engine.dtype", "slicing"),
    after=("corpus", "source"),
    run=_slicing,
    is_whole=_holds("sliced/config.json"),
    resumes=True,
)
SPARSIFYING = Stage(
    name="sparsifying",
    title="zeros in place of weights, layer by layer",
    keys=("seed", "corpus", "source", "engine.dtype", "sparsifying"),
    after=("corpus", "source"),
    run=_sparsifying,
    is_whole=_holds("sparse/config.json"),
    resumes=True,
)
RECOVERY = Stage(
    name="recovery",
    title="continued pretraining",
    keys=(*_STEERED, "pruning", "slicing", "sparsifying", "recovery"),
    after=("corpus", "references", "pruning", "slicing", "sparsifying"),
    run=_recovery,
    is_whole=_holds("model/config.json"),
    resumes=True,
)
SCRATCH = Stage(
    name="scratch",
    title="the same shape from nothing",
    keys=(*_STEERED, "pruning.target", "recovery", "scratch"),
    after=("corpus", "references"),
    run=_scratch,
    is_whole=_holds("scratch/config.json"),
    resumes=True,
)
SCORES = Stage(
    name="scores",
    title="what it is worth",
    keys=(*_BASE, "scores"),
    after=("corpus", "source", "extraction", "slicing", "sparsifying", "recovery", "scratch"),
    run=_scores,
)
REPORT = Stage(
    name="report",
    title="the whole on one page",
    keys=("name",),
    after=(
        "corpus",
        "source",
        "references",
        "pruning",
        "extraction",
        "slicing",
        "sparsifying",
        "recovery",
        "scratch",
        "scores",
    ),
    run=_report,
    is_whole=_holds("report/index.html"),
    needs_ray=False,
)
