"""The stages that train: a source model, the masks, the recovery, and the same shape from nothing."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from actors.export import choose_on_cluster, export_on_cluster, extract_on_cluster
from actors.held_out_losses import measure_losses
from actors.training import PhaseResult, run_phase
from orchestrator.console import format_duration
from orchestrator.phases import choosing_config, export_config, phase_config
from orchestrator.scoring_settings import task_resources
from orchestrator.source_model import trained_source_config
from orchestrator.stage import Context
from orchestrator.stages import score_protocol, smaller_folder, source_model
from orchestrator.time_forecast import step_forecasts
from shearing.data.manifest import TOKENIZER_FOLDER
from shearing.data.tokenizing import TOKENIZER_FILES
from shearing.models.directories import local_directory, publish_directory
from shearing.models.loading import GENERATION_FILE, write_json
from shearing.training.export import ExportConfig, agreement, with_mean
from shearing.training.phase import PhaseName
from shearing.training.shrinking import describe_forced


def run_source(context: Context) -> dict[str, Any]:
    """A llama of the recipe's shape, trained from nothing on the corpus by the loop that trains everything."""
    start = _write_source_shape(context)
    return _export(context, _train(context, "source", start), start, "source")


def run_pruning(context: Context) -> dict[str, Any]:
    """Mask learning, or choosing at once. Says plainly which gates are not within tolerance of the target."""
    pruning = context.recipe.pruning
    assert pruning is not None
    if pruning.method != "learned":
        return _choose(context, pruning.method)
    result = _train(context, "pruning", source_model(context))
    for problem in result.outcome["missed"]:
        context.console.warn(problem)
    if result.outcome["converged"]:
        context.console.note(f"every group and layer is within {pruning.gates.tolerance:g} of its target sparsity")
    return {"checkpoint": result.checkpoint, **result.outcome}


def _choose(context: Context, method: str) -> dict[str, Any]:
    config = choosing_config(
        context.recipe,
        source=source_model(context),
        destination=context.workspace.store.child("chosen").uri,
        corpus=context.outputs["corpus"]["path"],
    )
    outputs = choose_on_cluster(config, **task_resources(context.recipe))
    context.console.note(f"chosen by {method} in {format_duration(outputs['seconds'])}, without mask learning")
    return outputs


def run_extraction(context: Context) -> dict[str, Any]:
    """The pruned model as a Hugging Face directory, and the proof that it is what was learned."""
    pruning = context.outputs["pruning"]
    destination = context.workspace.store.child("pruned").uri
    config = _export_config(context, pruning["checkpoint"], source_model(context), destination)
    config = config.model_copy(update={"pruning": context.recipe.pruning})
    outputs = extract_on_cluster(config, **task_resources(context.recipe))
    reloaded = measure_losses(destination, score_protocol(context), **task_resources(context.recipe))
    outputs["proof"]["reloaded"] = with_mean(reloaded)
    outputs |= agreement(outputs["proof"], config.dtype)
    outputs |= {key: pruning[key] for key in ("converged", "gaps", "missed")}
    for name, forced in outputs["forced"].items():
        context.console.warn(describe_forced(name, forced))
    means = ", ".join(f"{name} {losses['mean']:.4f}" for name, losses in outputs["proof"].items())
    context.console.note(f"mean loss, nats a token: {means}")
    if not outputs["agrees"]:
        context.console.warn(
            f"masked, extracted and reloaded models differ by {outputs['largest_difference']:.2g} nats a token; at "
            f"most {outputs['agreement_tolerance']:g} is rounding. Do not use this model."
        )
    return outputs


def run_recovery(context: Context) -> dict[str, Any]:
    """Continued pretraining of the smaller model, of all its weights or of adapters."""
    smaller = context.workspace.store.child(smaller_folder(context.recipe)).uri
    return _export(context, _train(context, "recovery", smaller), smaller, "model")


def run_scratch(context: Context) -> dict[str, Any]:
    """The pruned model's shape with fresh weights, on as many tokens as recovery had."""
    pruned = context.workspace.store.child("pruned").uri
    return _export(context, _train(context, "scratch", pruned), pruned, "scratch")


def _train(context: Context, name: PhaseName, model: str) -> PhaseResult:
    phase = phase_config(
        context.recipe,
        name,
        model=model,
        source=model if name == "source" else source_model(context),
        corpus=context.outputs["corpus"]["path"],
        references=context.outputs.get("references", {}).get("losses", {}),
    )
    training = phase.training
    if forecast := step_forecasts(context.recipe, name):
        context.workspace.store.write_json(f"forecast/{name}.json", forecast)

    def show(report: dict[str, Any]) -> None:
        if report["kind"] == "step":
            steps = training.steps if report["step"] <= training.steps else training.most_steps
            context.console.progress(name, report, steps)
        elif report["kind"] == "event":
            context.console.note(report["text"])

    return run_phase(phase, context.workspace.store.uri, show)


def _export_config(context: Context, checkpoint: str, source: str, destination: str) -> ExportConfig:
    corpus = context.outputs["corpus"]["path"]
    return export_config(context.recipe, checkpoint=checkpoint, source=source, destination=destination, corpus=corpus)


def _export(context: Context, result: PhaseResult, source: str, folder: str) -> dict[str, Any]:
    destination = context.workspace.store.child(folder).uri
    config = _export_config(context, result.checkpoint, source, destination)
    return {"checkpoint": result.checkpoint} | export_on_cluster(config, **task_resources(context.recipe))


def _write_source_shape(context: Context) -> str:
    """A directory with config.json and tokenizer but no weights, for a model that starts from nothing."""
    recipe, (corpus, manifest) = context.recipe, context.corpus()
    store = context.workspace.store.child("source-shape")
    boundary = manifest.tokenizer.boundary_token_id
    config = trained_source_config(recipe, manifest.tokenizer.vocab_size, boundary)
    tokenizer = local_directory(corpus.child(TOKENIZER_FOLDER).uri)
    with TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                (Path(folder) / name).write_bytes((tokenizer / name).read_bytes())
        write_json(Path(folder) / "config.json", config)
        write_json(Path(folder) / GENERATION_FILE, {"bos_token_id": boundary, "eos_token_id": boundary})
        publish_directory(Path(folder), store)
    return store.uri
