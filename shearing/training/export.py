"""From a checkpoint to a Hugging Face directory, and what the models of a run are measured by on the way."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearing.config import Config
from shearing.models.directories import local_directory, publish_directory
from shearing.models.loading import StoredTensors, read_config, read_generation_config, write_model_directory
from shearing.models.parameters import count_parameters
from shearing.pruning.config import PruningConfig
from shearing.storage import Store, open_store
from shearing.training.adapters import merged_tensors, write_adapters
from shearing.training.checkpoint import LORA_KEY, CheckpointReader
from shearing.training.config import LoraConfig
from shearing.training.engine import DTYPES

# Largest difference in mean loss, nats a token, between models that should be one function: the order of summation
# differs, and bfloat16 keeps 8 bits of it.
AGREEMENT_NATS = {"float32": 1e-4, "bfloat16": 1e-2}


class CheckpointTensors(Mapping[str, Tensor]):
    """A checkpoint's weights by name in one dtype; holds the file that was read last."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        self._reader, self._dtype = reader, dtype
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self._files: dict[str, str] = {}
        for file in reader.weight_files:
            self._files |= dict.fromkeys((name for name in reader.names(file) if "::" not in name), file)

    def _open(self, file: str) -> dict[str, Tensor]:
        if self._held[0] != file:
            self._held = (file, self._reader.weights(file))
        return self._held[1]

    def __getitem__(self, name: str) -> Tensor:
        return self._open(self._files[name])[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class ExportConfig(Config):
    """What export and extraction need; plain values, so that they travel to any node."""

    checkpoint: str
    source: str
    destination: str
    corpus: str
    sequences_per_domain: int
    batch_sequences: int
    dtype: str
    trust_remote_code: bool = False
    pruning: PruningConfig | None = None


def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write a phase's last weights as a Hugging Face directory of the same shape as `source`. Returns its size.

    Adapters are added to the weights of `source`, or lie beside them, as they were trained to.
    """
    source, destination = local_directory(config.source), open_store(config.destination)
    reader, dtype = CheckpointReader(open_store(config.checkpoint)), DTYPES[config.dtype]
    model_config, state = read_config(source), reader.state()
    parameters = count_parameters(model_config)
    lora = LoraConfig.model_validate(state[LORA_KEY]) if LORA_KEY in state else None
    if lora is None:
        tensors = CheckpointTensors(reader, dtype)
        write_directory(destination, model_config, ((name, tensors[name]) for name in tensors), source)
        return {"model": config.destination, "parameters": parameters}
    adapters = dict(CheckpointTensors(reader, torch.float32))
    if lora.merge:
        write_directory(destination, model_config, merged_tensors(StoredTensors(source), adapters, lora, dtype), source)
        return {"model": config.destination, "parameters": parameters}
    with tempfile.TemporaryDirectory() as folder:
        rounded = {name: tensor.to(dtype) for name, tensor in adapters.items()}
        write_adapters(Path(folder), source, model_config, rounded, lora)
        publish_directory(Path(folder), destination)
    return {
        "model": config.destination,
        "parameters": parameters + sum(tensor.numel() for tensor in adapters.values()),
    }


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights by name into a model, in the order in which `tensors` gives them: a file at a time.

    Raises:
        KeyError: A weight of the model is not there.
    """
    parameters = dict(model.named_parameters())
    if missing := parameters.keys() - tensors.keys():
        raise KeyError(", ".join(sorted(missing)))
    with torch.no_grad():
        for name in tensors:
            if name in parameters:
                parameters[name].copy_(tensors[name])


def agreement(
    proof: Mapping[str, Any], dtype: str, names: Sequence[str] = ("exact_target", "extracted", "reloaded")
) -> dict[str, Any]:
    """Whether the models of these names are one, by their loss in every domain; what is no number agrees with nothing.

    By default masked at the exact target, extracted and reloaded.
    """
    losses = [[proof[name]["domains"][domain] for name in names] for domain in proof[names[0]]["domains"]]
    finite = all(math.isfinite(loss) for of_domain in losses for loss in of_domain)  # `max` passes over a NaN
    largest = max(max(of_domain) - min(of_domain) for of_domain in losses) if finite else math.inf
    tolerance = AGREEMENT_NATS[dtype]
    return {"largest_difference": largest, "agreement_tolerance": tolerance, "agrees": largest <= tolerance}


def with_mean(losses: dict[str, float]) -> dict[str, Any]:
    """Losses per domain and their plain mean, in nats a token."""
    return {"mean": sum(losses.values()) / len(losses), "domains": losses}


def write_directory(destination: Store, config: dict[str, Any], tensors: Any, source: Path) -> None:
    """Write a model's directory, tokenizer and generation config of `source` beside it."""
    generation = read_generation_config(source)
    if destination.is_local:
        write_model_directory(destination.path, config, tensors, tokenizer_folder=source, generation_config=generation)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model"
        write_model_directory(local, config, tensors, tokenizer_folder=source, generation_config=generation)
        publish_directory(local, destination)
