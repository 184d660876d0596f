"""The stage that rotates and slices, and its proof that rotation changed nothing."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.held_out_losses import measure_losses
from actors.run_log import RunLog
from actors.slicing import SlicingSettings, slice_on_cluster
from orchestrator.calibration_text import calibration_settings
from orchestrator.console import format_duration
from orchestrator.plan_text import format_bytes
from orchestrator.scoring_settings import task_resources
from orchestrator.sliced_model import kept_sizes, residual_parameters
from orchestrator.stage import Context
from orchestrator.stages import score_protocol, source_model
from shearing.models.directories import local_directory, publish_directory
from shearing.models.family import shape_of
from shearing.models.loading import read_config
from shearing.models.parameters import count_parameters
from shearing.pruning.slicing.full_size import write_rotated_model
from shearing.pruning.slicing.job import LayerReport
from shearing.storage import open_store
from shearing.training.engine import DTYPES
from shearing.training.export import agreement, with_mean

PROOF_FOLDER = "rotated"


def run_slicing(context: Context) -> dict[str, Any]:
    """The sliced model as a directory, and how its source does at every step on the way to it."""
    recipe, store = context.recipe, context.workspace.store
    source, destination = source_model(context), store.child("sliced").uri
    assert recipe.slicing is not None
    config = read_config(local_directory(source))
    settings = SlicingSettings(
        destination=destination,
        work=store.child("slicing").uri,
        slicing=recipe.slicing,
        calibration=calibration_settings(context, recipe.slicing.calibration.sequences),
    )
    kept = kept_sizes(config, recipe.slicing)
    report = slice_on_cluster(settings, _shown(context, kept), context.console.note)
    proof = {"dense": _dense(context), "rotated": _rotated(context), "sliced": _measured(context, destination)}
    made = read_config(local_directory(destination))
    outputs = {
        "model": destination,
        "proof": proof,
        **rotation_agreement(proof, recipe.engine.dtype),
        "kept": kept,
        "kept_variance": report.kept_variance,
        "source_shape": shape_of(config).model_dump(),
        "parameters": {
            "source": count_parameters(config),
            "target": report.parameters,
            "residual": residual_parameters(made),
        },
    }
    means = ", ".join(f"{name} {losses['mean']:.4f}" for name, losses in proof.items())
    context.console.note(f"mean loss, nats a token: {means}")
    if not outputs["agrees"]:
        context.console.warn(
            f"the dense model and the one rotated at full size differ by {outputs['largest_difference']:.2g} nats a "
            f"token; at most {outputs['agreement_tolerance']:g} is rounding. Do not use this model."
        )
    open_store(settings.work).delete()  # a stop in one of the measurements costs no layer
    return outputs


def rotation_agreement(proof: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Whether the dense model and the one rotated at full size are one, by their loss in every domain."""
    return agreement(proof, dtype, ("dense", "rotated"))


def _shown(context: Context, kept: list[int]) -> Any:
    """What is written and said after every layer; `kept` has the size of every signal."""
    log = RunLog(context.workspace.store.uri, "slicing")

    def show(report: LayerReport, figures: dict[str, Any]) -> None:
        number, each = report.layer + 1, (len(kept) - 1) // report.num_layers
        sizes, shares = kept[1 + report.layer * each :][:each], dict(report.kept_variance)
        row = {"kind": "layer", "step": number, "time": time.time(), "kept": sizes, "kept_variance": shares}
        log.push([row | figures])
        log.flush()
        variance = ", ".join(f"{100 * share:.2f} % after {half}" for half, share in shares.items())
        context.console.note(
            f"layer {number} of {report.num_layers}: kept {' and '.join(f'{size:,}' for size in sizes)} dimensions"
            + (f", of the sum of squares {variance}; " if variance else "; ")
            + f"{format_duration(figures['seconds'])}, at most {format_bytes(figures['worker_peak_bytes'])} in a worker"
        )

    return show


def _dense(context: Context) -> dict[str, Any]:
    references = context.outputs["references"]
    if references["kind"] == "source":  # measured by the same protocol just before
        return with_mean(references["losses"])
    return _measured(context, source_model(context))


def _rotated(context: Context) -> dict[str, Any]:
    """The source with its norms fused and every signal rotated at full size, read back from disk."""
    store = context.workspace.store.child(PROOF_FOLDER)
    slicing, source = context.recipe.slicing, local_directory(source_model(context))
    assert slicing is not None
    with tempfile.TemporaryDirectory(prefix="shear-rotated-") as folder:
        write_rotated_model(source, Path(folder), slicing, DTYPES[context.recipe.engine.dtype])
        publish_directory(Path(folder) / "rotated", store)
    losses = _measured(context, store.uri)
    store.delete()
    return losses


def _measured(context: Context, model: str) -> dict[str, Any]:
    losses = measure_losses(model, score_protocol(context), **task_resources(context.recipe))
    return with_mean({domain: losses[domain] for domain in context.recipe.corpus.domains})
