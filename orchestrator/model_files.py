"""Whether the files of a model directory are whole, told without torch or safetensors and without reading weights."""

import json
from pathlib import Path
from typing import Any

from shearing.errors import UserError

_OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LENGTH_BYTES = 8  # a safetensors file: the header's length, little-endian; the header, JSON; the tensors' bytes
_POINTER = b"version https://git-lfs"


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        FileNotFoundError: There is none.
        UserError: It holds something else.
    """
    data = file.read_bytes()
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON ({error}){_remedy(data)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON mapping, but a {type(found).__name__}{_remedy(data)}")
    return found


def weight_problems(folder: Path, key: str = "source.model") -> list[str]:
    """What is wrong with the weight files of a model directory that the recipe names under `key`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_problems(index, f"{key} = {str(folder)!r}")
    if (folder / "model.safetensors").is_file():
        return _shard_problems(folder / "model.safetensors")
    if any((folder / name).is_file() for name in _OLD_WEIGHTS):
        return [
            f"{key} = {str(folder)!r} holds its weights as pickles (.bin) only, which can run code when read "
            "and are never loaded here; convert them to safetensors (model.save_pretrained writes these) and name that "
            "directory."
        ]
    return [f"{key} = {str(folder)!r} holds no model.safetensors and no index of several: no weights."]


def _indexed_problems(index: Path, named: str) -> list[str]:
    try:
        weight_map = read_mapping(index).get("weight_map")
    except UserError as error:
        return error.problems
    if not isinstance(weight_map, dict):
        return [f"{index} has no weight_map, which says where each weight lies; download it again."]
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        return [
            f"{named} lacks {len(missing)} of {len(shards)} weight files that its index names "
            f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}); download them again."
        ]
    return [problem for shard in shards for problem in _shard_problems(index.parent / shard)]


def _shard_problems(file: Path) -> list[str]:
    """What is wrong with a safetensors file by its header and its size, which have to agree to the byte."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            return [f"{file} ({size:,} bytes) is no whole safetensors file{_remedy(start)}"]
        stream.seek(_LENGTH_BYTES)
        header = stream.read(length)
    try:
        entries = json.loads(header).items()
        end = max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return [f"{file} is no safetensors file: its header cannot be read{_remedy(start)}"]
    wanted = _LENGTH_BYTES + length + end
    if size == wanted:
        return []
    return [f"{file} is cut short or damaged: {size:,} bytes, where its header says {wanted:,}{_remedy(start)}"]


def _remedy(data: bytes) -> str:
    """How such a file is had whole, as the end of a message."""
    return ": a git-LFS pointer; run `git lfs pull` there." if data.startswith(_POINTER) else "; download it again."
