"""Checkpoints that know nothing of ranks: float32 weights and Adam moments by parameter name, in safetensors.

Every rank writes the parameters it is given by size, reads its share of the files back and hands them to the others,
so a checkpoint of any number of workers and any ZeRO stage resumes on any other. Nothing in it is a pickle.
`index.json` names all files with their bytes; a folder without it, or where a file is missing or short, is no
checkpoint.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load as load_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from shearing.storage import Store
from shearing.training.engine import ADAM_MOMENTS, Engine, NamedState

INDEX_NAME = "index.json"
STATE_NAME = "state.json"
LORA_KEY = "lora"  # of the state, where the weights are adapters: how they were put on
FORMAT_VERSION = 1
PART_BYTES = 2 * 2**30


class IncompleteCheckpointError(RuntimeError):
    """A folder that should be a checkpoint lacks a file or a part of one."""


@dataclass
class _PartWriter:
    """Collects tensors and writes them in files of at most about PART_BYTES."""

    folder: Path
    rank: int
    parts: int = 0
    held_bytes: int = 0

    def __post_init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.files: dict[str, int] = {}

    def add(self, state: NamedState) -> None:
        """Take a parameter with its moments to the CPU; they stay in one file, for loading reads file by file."""
        tensors = {state.name: state.value} | {f"{state.name}::{key}": m for key, m in state.moments.items()}
        self.tensors |= {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self.held_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.held_bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            path = self.folder / f"weights-r{self.rank:04d}-p{self.parts:03d}.safetensors"
            save_file(self.tensors, path)
            self.files[path.name] = path.stat().st_size
            self.parts, self.held_bytes, self.tensors = self.parts + 1, 0, {}


def save_checkpoint(
    engine: Engine, folder: Path, state: dict[str, Any], arrays: dict[str, dict[str, np.ndarray | torch.Tensor]]
) -> None:
    """Write this rank's part into its own local folder; the folders of all ranks together are the checkpoint.

    `arrays` maps a file's stem to its tensors; rank 0 writes them, `state` and the index (collective).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    writer = _PartWriter(folder, rank)
    held_bytes = [0] * world
    for entry in engine.states():
        owner = held_bytes.index(min(held_bytes))
        held_bytes[owner] += entry.value.nbytes
        if owner == rank:
            writer.add(entry)
    writer.flush()
    gathered: list[dict[str, int]] = [{} for _ in range(world)]
    dist.all_gather_object(gathered, writer.files)
    if rank == 0:
        files = {name: size for part in gathered for name, size in part.items()}
        for stem, tensors in arrays.items():
            path = folder / f"{stem}.safetensors"
            save_file({name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}, path)
            files[path.name] = path.stat().st_size
        (folder / STATE_NAME).write_text(json.dumps(state))
        files[STATE_NAME] = (folder / STATE_NAME).stat().st_size
        (folder / INDEX_NAME).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}))


@dataclass(frozen=True)
class CheckpointReader:
    """A finished checkpoint. Raises IncompleteCheckpointError where a file is absent or has another size."""

    store: Store

    def __post_init__(self) -> None:
        found = {info.base_name: info.size for info in self.store.files()}
        if INDEX_NAME not in found:
            raise IncompleteCheckpointError(f"{self.store.uri} has no {INDEX_NAME}")
        for name, size in self.files.items():
            if found.get(name) != size:
                raise IncompleteCheckpointError(f"{self.store.uri}/{name} is missing or not {size} bytes long")

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        files: dict[str, int] = self.store.read_json(INDEX_NAME)["files"]
        return files

    @property
    def weight_files(self) -> list[str]:
        """Files of weights and moments, in order."""
        return sorted(name for name in self.files if name.startswith("weights-"))

    def state(self) -> dict[str, Any]:
        """The values that are no tensors."""
        state: dict[str, Any] = self.store.read_json(STATE_NAME)
        return state

    def arrays(self, stem: str) -> dict[str, np.ndarray]:
        """Tensors of one of rank 0's files; empty where there is none."""
        name = f"{stem}.safetensors"
        return load_arrays(self.store.read_bytes(name)) if name in self.files else {}

    def weights(self, file: str) -> dict[str, torch.Tensor]:
        """Tensors of one weight file: float32 values by name, Adam moments by `name::moment`."""
        return load_tensors(self.store.read_bytes(file))


def load_checkpoint(engine: Engine, reader: CheckpointReader, step: int) -> None:
    """Fill the engine: each file is read by one rank, all ranks at the same time, and handed to all (collective)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = dict(engine.named_parameters())
    engine.begin_loading(step)
    missing = set(parameters)
    files = reader.weight_files
    mine = _ReadAhead(reader, files[rank::world])
    for number in range(len(files)):
        owner = number % world
        tensors = mine.next() if owner == rank else {}
        whole_names = [n for n in tensors if all(f"{n}::{moment}" in tensors for moment in ADAM_MOMENTS)]
        listing: list[Any] = [{name: tuple(tensors[name].shape) for name in whole_names}]
        dist.broadcast_object_list(listing, src=owner)
        for name, shape in listing[0].items():
            whole = {
                key: _handed_out(tensors.get(key), shape, owner, engine.device)
                for key in (name, *(f"{name}::{moment}" for moment in ADAM_MOMENTS))
            }
            moments = {moment: whole[f"{name}::{moment}"] for moment in ADAM_MOMENTS}
            engine.load(parameters[name], whole[name], moments)
            missing.discard(name)
    if missing:
        raise IncompleteCheckpointError(f"{reader.store.uri} has no weights or moments for {sorted(missing)[:5]}")


class _ReadAhead:
    """The tensors of files, one file after another; the next one is read while the last is in use.

    Read only when it is a rank's turn, all files would be read one by one while every other rank waits.
    """

    def __init__(self, reader: CheckpointReader, files: list[str]) -> None:
        self.reader, self.files = reader, iter(files)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-checkpoint")
        self._begin()

    def _begin(self) -> None:
        file = next(self.files, None)
        self.reading = self.thread.submit(self.reader.weights, file) if file is not None else None

    def next(self) -> dict[str, torch.Tensor]:
        assert self.reading is not None, "each file once"
        tensors = self.reading.result()
        self._begin()
        return tensors


def _handed_out(tensor: torch.Tensor | None, shape: tuple[int, ...], owner: int, device: torch.device) -> torch.Tensor:
    whole = torch.empty(shape, device=device) if tensor is None else tensor.to(device)
    dist.broadcast(whole, src=owner)
    return whole
