"""A model directory sliced, layer by layer, over shares of calibration text wherever they are (arXiv 2401.15024).

In memory here are one layer's weights and a few matrices [D, D]; the text's hidden states are with the shares.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shearing.errors import UserError
from shearing.models.layerwise import LayerwiseModel
from shearing.models.loading import MAX_SHARD_BYTES, read_generation_config, write_model_directory
from shearing.models.parameters import count_parameters
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.job import LayerReport, Shares, SlicingJob
from shearing.pruning.slicing.per_signal import slice_every_signal
from shearing.pruning.slicing.plan import check_slicing, sliced_config
from shearing.pruning.slicing.shared import slice_all_signals
from shearing.pruning.slicing.weights import RotatedWeights
from shearing.pruning.slicing.work import SlicingWork


@dataclass(frozen=True)
class SlicingReport:
    """A finished run.

    Attributes:
        parameters: Of the result, all of them, residual matrices included.
        kept_variance: Share of the sum of squares that slicing leaves of every signal, in the order of the model; with
            a shared rotation one number, the mean over all signals.
    """

    parameters: int
    kept_variance: list[float]


def slice_model(
    source: str | Path,
    target: str | Path,
    work: str | Path,
    slicing: SlicingConfig,
    shares: Shares,
    *,
    dtype: torch.dtype | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> SlicingReport:
    """Slices a model directory into another one; called again after it was killed, it goes on at the same layer.

    Args:
        source: A Hugging Face directory of a registered family.
        target: Written when all layers are finished.
        work: Folder of what is finished so far; the caller deletes it.
        slicing: What is asked for.
        shares: The calibration text.
        dtype: Of the result's weights; default the source's.
        on_layer: Called after every layer.
        max_shard_bytes: Size of the result's files.

    Returns:
        Figures. The same shares give the same bits, resumed or not.

    Raises:
        UserError: A model that cannot be sliced so, or a work folder of another run.
    """
    model = LayerwiseModel(source)
    problems = check_slicing(model.config, slicing)
    if problems:
        raise UserError(problems)
    dtype = dtype or model.tensors[f"{model.family.layer_module(0, model.family.output)}.weight"].dtype
    settings = {
        "source": _digest(model),
        "slicing": json.loads(slicing.model_dump_json(exclude={"calibration"})),
        "calibration text": list(shares.map("digest")),
        "type": str(dtype),
    }
    weights = RotatedWeights(model.family, model.tensors, dtype)
    job = SlicingJob(model, slicing, shares, SlicingWork(work, settings), weights, on_layer)
    tensors = slice_all_signals(job) if slicing.rotation == "shared" else slice_every_signal(job)
    config = sliced_config(model.config, slicing)
    write_model_directory(
        target,
        config,
        tensors,
        tokenizer_folder=source,
        generation_config=read_generation_config(source),
        max_shard_bytes=max_shard_bytes,
    )
    return SlicingReport(count_parameters(config), [kept for step in job.work.finished for kept in step.values()])


def _digest(model: LayerwiseModel) -> str:
    """A name for the source: its config, the names of its weights and some of them."""
    family, found = model.family, hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    found.update(json.dumps(sorted(model.tensors)).encode())
    for name in (family.final_norm, family.layer_module(model.num_layers - 1, family.output)):
        found.update(model.tensors[f"{name}.weight"].double().numpy().tobytes())
    return found.hexdigest()[:16]
