"""The stage that puts zeros in place of weights."""

import time
from typing import Any

from actors.held_out_losses import measure_losses
from actors.run_log import RunLog
from actors.sparsifying import SparsifyingSettings, sparsify_on_cluster
from orchestrator.calibration_text import calibration_settings
from orchestrator.console import format_duration
from orchestrator.scoring_settings import task_resources
from orchestrator.stage import Context
from orchestrator.stages import score_protocol, source_model
from shearing.models.directories import local_directory
from shearing.models.family import shape_of
from shearing.models.loading import read_config
from shearing.models.parameters import count_parameters
from shearing.pruning.sparsity.layers import LinearRecord
from shearing.storage import open_store
from shearing.training.export import with_mean


def run_sparsifying(context: Context) -> dict[str, Any]:
    """The sparse model as a directory of the source's own shape, and its loss."""
    recipe, store, source = context.recipe, context.workspace.store, source_model(context)
    destination = store.child("sparse").uri
    assert recipe.sparsifying is not None
    settings = SparsifyingSettings(
        destination=destination,
        work=store.child("sparsifying").uri,
        sparsifying=recipe.sparsifying,
        calibration=calibration_settings(context, recipe.sparsifying.calibration.sequences),
    )
    record = sparsify_on_cluster(settings, _shown(context), context.console.note)
    losses = with_mean(measure_losses(destination, score_protocol(context), **task_resources(context.recipe)))
    config = read_config(local_directory(source))
    parameters = count_parameters(config)
    context.console.note(
        f"{100 * record['achieved_fraction']:.2f} % of {record['weights']:,} weights are 0, {record['pattern']} by "
        f"{record['method']}; mean loss {losses['mean']:.4f} nats a token"
    )
    open_store(settings.work).delete()  # a stop in the measurement costs no layer
    return {
        "model": destination,
        "losses": losses,
        "source_shape": shape_of(config).model_dump(),
        "parameters": {"source": parameters, "target": parameters, "not_zero": parameters - record["zeros"]},
        **{key: record[key] for key in ("pattern", "method", "weights", "zeros", "achieved_fraction")},
    }


def _shown(context: Context) -> Any:
    """What is written and said after every layer."""
    log = RunLog(context.workspace.store.uri, "sparsifying")

    def show(layer: int, records: dict[str, LinearRecord], figures: dict[str, Any]) -> None:
        errors = {name: record.relative_error for name, record in records.items()}
        log.push([{"kind": "layer", "step": layer + 1, "time": time.time(), "relative_errors": errors} | figures])
        log.flush()
        known = [error for error in errors.values() if error is not None]
        lost = f", {100 * max(known):.2f} % of the worst output's square lost" if known else ""
        context.console.note(f"layer {layer + 1} in {format_duration(figures['seconds'])}{lost}")

    return show
