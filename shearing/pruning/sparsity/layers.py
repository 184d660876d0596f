"""A model made sparse one decoder layer after another; what is finished stays finished."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearing.models.layerwise import LayerwiseModel
from shearing.models.loading import read_generation_config, write_json, write_model_directory
from shearing.pruning.sparsity.calibration import Hessians
from shearing.pruning.sparsity.config import SparsityConfig
from shearing.pruning.sparsity.sparsegpt import (
    TWO_OF_FOUR,
    Pattern,
    at_random,
    magnitude,
    relative_error,
    sparsegpt,
)

RECORD_FILE = "sparsity.json"
INPUTS_FILE = "inputs.json"


class Calibration(Protocol):
    """All calibration text on its way through the model: one share of it, or many whose sums are added."""

    def embed(self) -> None:
        """Go to what the first layer reads."""

    def hessians(self, layer: int) -> Hessians:
        """Sums over the inputs of the linear layers in the decoder layer that is reached."""

    def follow(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Go past that layer with these weights in it."""


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear layer.

    Attributes:
        weights: Entries of its matrix.
        zeros: How many of them are 0.
        relative_error: Squared change of its output over the calibration text, as a share of the output's own square;
            None where nothing was measured.
    """

    weights: int
    zeros: int
    relative_error: float | None


class FinishedLayers:
    """The sparse weights of layers that are done, in a folder; another run with the same inputs goes on from them.

    Args:
        folder: Made if it is not there; emptied where it holds layers of other inputs.
        source: The source model's directory.
        config: What is asked for.
        calibration: The name of the calibration text, from `text_digest`, and of the type that it is looked at in; None
            without.
    """

    def __init__(self, folder: Path, source: str | Path, config: SparsityConfig, calibration: str | None) -> None:
        self.folder = folder
        inputs = {"source": _fingerprint(Path(source)), "config": config.model_dump(), "calibration": calibration}
        if not (folder / INPUTS_FILE).is_file() or json.loads((folder / INPUTS_FILE).read_text()) != inputs:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / INPUTS_FILE, inputs)

    def records(self, layer: int) -> dict[str, LinearRecord] | None:
        """What became of a layer's linear layers, by their names in it; None where it is not done."""
        if not self._records(layer).is_file():
            return None
        found = json.loads(self._records(layer).read_text())
        return {name: LinearRecord(**record) for name, record in found.items()}

    def weights(self, layer: int) -> dict[str, Tensor]:
        """The sparse weights of a layer that is done, by the names of its linear layers."""
        return load_file(self._weights(layer))

    def write(self, layer: int, weights: Mapping[str, Tensor], records: Mapping[str, LinearRecord]) -> None:
        """Keep a layer; the records are written last and make it a finished one."""
        for path, write in (
            (self._weights(layer), lambda to: save_file(dict(weights), to)),
            (self._records(layer), lambda to: write_json(to, {name: asdict(r) for name, r in records.items()})),
        ):
            partial = path.with_suffix(".partial")
            write(partial)
            os.replace(partial, path)

    def delete(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _weights(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.safetensors"

    def _records(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.json"


def sparse_layers(
    source: str | Path,
    config: SparsityConfig,
    calibration: Calibration | None,
    finished: FinishedLayers,
    device: str = "cpu",
) -> Iterator[dict[str, LinearRecord]]:
    """Makes every linear layer of every decoder layer sparse, and keeps each decoder layer in `finished`.

    All matrices of a decoder layer are pruned on what they read in the dense layer behind sparse ones; what the next
    layer reads has passed this one's zeros. Embeddings, norms, biases and LM head stay as they are.

    Args:
        source: The source model's directory.
        config: What is asked for.
        calibration: At the beginning of the text; None will do for methods that measure nothing.
        finished: Layers in it are not pruned again; the text only passes them.
        device: Where matrices are pruned.

    Yields:
        What became of each layer's linear layers, by their names in it.

    Source: arXiv 2301.00774, section 3.
    """
    model = LayerwiseModel(source)
    if calibration is not None:
        calibration.embed()
    for layer in range(model.num_layers):
        if finished.records(layer) is None:
            hessians = {} if calibration is None else calibration.hessians(layer)
            finished.write(layer, *_prune_layer(model, layer, config, hessians, device))
        if calibration is not None and layer + 1 < model.num_layers:
            calibration.follow(layer, finished.weights(layer))
        records = finished.records(layer)
        assert records is not None
        yield records


def _prune_layer(
    model: LayerwiseModel, layer: int, config: SparsityConfig, hessians: Hessians, device: str
) -> tuple[dict[str, Tensor], dict[str, LinearRecord]]:
    by_name = {name: hessian_II for names, hessian_II in hessians.items() for name in names}
    weights, records = {}, {}
    for number, name in enumerate(model.linears(layer)):
        full, error = model.family.layer_module(layer, name), None
        dense_OI = model.tensors[f"{full}.weight"].to(device)
        if config.method == "sparsegpt":
            hessian_II = by_name[name].to(device)
            try:
                sparse_OI = sparsegpt(dense_OI, hessian_II, _pattern(config))
            except ValueError as problem:
                raise ValueError(f"{full}: {problem}") from None
            error = relative_error(dense_OI, sparse_OI, hessian_II)
        else:
            sparse_OI = _without_calibration(dense_OI, config, (layer, number))
        weights[name] = sparse_OI.cpu().contiguous()
        records[name] = LinearRecord(sparse_OI.numel(), int((sparse_OI == 0).sum()), error)
    return weights, records


def _pattern(config: SparsityConfig) -> Pattern:
    return TWO_OF_FOUR if config.pattern == "2:4" else config.dropped


def _without_calibration(dense_OI: Tensor, config: SparsityConfig, place: tuple[int, int]) -> Tensor:
    if config.method == "magnitude":
        return magnitude(dense_OI, _pattern(config))
    seed = hashlib.sha256(f"{config.seed}/{place}".encode()).digest()[:7]
    return at_random(dense_OI, _pattern(config), torch.Generator().manual_seed(int.from_bytes(seed, "big")))


def write_sparse_model(
    source: str | Path, result: str | Path, config: SparsityConfig, calibration: str | None, finished: FinishedLayers
) -> dict[str, Any]:
    """Writes the sparse model: a plain directory of the source's shape, with a record of its zeros beside the weights.

    Args:
        source: The source model's directory, whose tokenizer and generation config go along.
        result: Replaced if it exists.
        config: What was asked for.
        calibration: The name of the calibration text; None without.
        finished: Holds every layer.

    Returns:
        What `sparsity.json` says: what was asked for, and the zeros of each linear layer, by its full name, and of all.
    """
    model = LayerwiseModel(source)
    record = _record(model, config, calibration, finished)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for layer in range(model.num_layers):
            for name, weight in finished.weights(layer).items():
                yield f"{model.family.layer_module(layer, name)}.weight", weight
        for name, tensor in model.tensors.items():
            if name.removesuffix(".weight") not in record["linears"]:
                yield name, tensor

    write_model_directory(
        result,
        model.config,
        tensors(),
        tokenizer_folder=source,
        generation_config=read_generation_config(source),
        records={RECORD_FILE: record},
    )
    return record


def _record(
    model: LayerwiseModel, config: SparsityConfig, calibration: str | None, finished: FinishedLayers
) -> dict[str, Any]:
    linears: dict[str, dict[str, Any]] = {}
    for layer in range(model.num_layers):
        records = finished.records(layer)
        assert records is not None, f"layer {layer} is not finished"
        for name, found in records.items():
            shown = asdict(found) | {"fraction": found.zeros / found.weights}
            linears[model.family.layer_module(layer, name)] = shown
    weights, zeros = (sum(entry[key] for entry in linears.values()) for key in ("weights", "zeros"))
    return {
        "pattern": config.pattern,
        "method": config.method,
        "fraction": config.dropped,
        "calibration": None if calibration is None else {**config.calibration.model_dump(), "text": calibration},
        "weights": weights,
        "zeros": zeros,
        "achieved_fraction": zeros / weights,
        "linears": linears,
    }


def _fingerprint(folder: Path) -> dict[str, list[int]]:
    """Name, size and time of change of what a model directory holds."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
