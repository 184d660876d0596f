"""Models in and out: Hugging Face directories, fresh models of a shape."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shearing.data.tokenizing import TOKENIZER_FILES
from shearing.errors import UserError
from shearing.models import sliced_modeling, uneven_modeling
from shearing.models.families import FAMILIES
from shearing.models.family import SLICED, family_of, is_tied, memory_name, stored_name
from shearing.models.parameters import UNEVEN

MAX_SHARD_BYTES = 5_000_000_000
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# Modelling files of ours, by the config key of the models that need them, and their names beside the weights.
MODELING: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {UNEVEN: (uneven_modeling, "modeling_uneven.py"), SLICED: (sliced_modeling, "modeling_sliced.py")}
)
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        UserError: There is none.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: a Hugging Face model directory is expected there.")
    return json.loads(path.read_text())


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a Hugging Face directory, in evaluation mode, with torch's own attention."""
    config = read_config(folder)
    loader: Any = _own_class(config)
    if loader is not None:  # our own copy of the file that lies beside such weights: nobody has to be trusted
        trust_remote_code = False
    return (loader or AutoModelForCausalLM).from_pretrained(
        str(folder),
        dtype=dtype,
        attn_implementation=_attention(config),
        trust_remote_code=trust_remote_code,
    )


def _own_class(config: Mapping[str, Any]) -> Any:
    """The class of ours that such a model needs; None for a stock model."""
    for key, (module, _) in MODELING.items():
        if key in config:
            return getattr(module, config["architectures"][0])
    return None


def _attention(config: Mapping[str, Any]) -> str:
    family = FAMILIES.get(str(config.get("model_type")))
    return "sdpa" if family is None else family.attention


def new_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of a config with fresh weights, Hugging Face's own initialisation; global random state is left alone.

    Args:
        config: A config.json's dict with `model_type`.
        dtype: Of the weights; drawn in float32 and rounded, so that types differ by rounding only.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _built(config, torch.float32)
    cast_parameters(model, dtype)
    return model


def blank_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a config without any weights or buffers: all on torch's meta device, in evaluation mode."""
    with torch.device("meta"):
        return _built(config, dtype).eval()


def _built(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    values = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(values)
    options = {"dtype": dtype, "attn_implementation": _attention(config)}
    own = _own_class(config)
    if own is not None:
        return own._from_config(hf_config, **options)
    return AutoModelForCausalLM.from_config(hf_config, **options)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds a model's weights to a type, in place; buffers stay as they are.

    `model.to(dtype)` would round the frequencies of the rotary embedding too, which a loaded model keeps in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


class StoredTensors(Mapping[str, Tensor]):
    """The weights of a model directory by their names in memory, each read from its file when asked for.

    Args:
        folder: Holds config.json, and model.safetensors or shards with their index.

    Raises:
        UserError: It lacks one of them.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if (folder / INDEX_FILE).is_file():
            weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        elif (folder / WEIGHTS_FILE).is_file():
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
                files = dict.fromkeys(stored.keys(), folder / WEIGHTS_FILE)
        else:
            raise UserError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights in safetensors are expected. "
                "Save the model with save_pretrained of a recent transformers."
            )
        config = read_config(folder)
        self._places = {memory_name(config, name): (name, file) for name, file in files.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored_as, file = self._places[name]
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(stored_as)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def model_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model in memory by name; the LM head is left out where it is the embedding table."""
    head = f"{family_of(model.config).lm_head}.weight" if is_tied(model.config) else None
    for name, parameter in model.named_parameters():
        if name != head:
            yield name, parameter.detach()


def write_model_directory(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer_folder: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    records: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory that stock `AutoModelForCausalLM.from_pretrained` loads; complete or absent.

    Args:
        folder: Replaced if it exists.
        config: The config.json; its `dtype` is set to the weights' own.
        tensors: Weights by their names in memory, written as they come: no more than one shard is held in memory.
        tokenizer_folder: Whose tokenizer files are copied.
        generation_config: Written as generation_config.json; None writes none.
        records: JSON files that are written too, by name.
        max_shard_bytes: Weights beyond this go to several files with an index.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = ((stored_name(config, name), tensor) for name, tensor in tensors)
    dtype = _write_weights(partial, named, max_shard_bytes)
    written = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    write_json(partial / CONFIG_FILE, written)
    if generation_config is not None:
        write_json(partial / GENERATION_FILE, generation_config)
    for key, (module, name) in MODELING.items():
        if key in config:
            shutil.copyfile(module.__file__, partial / name)
    for name, record in records.items():
        write_json(partial / name, record)
    if tokenizer_folder is not None:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_folder) / name).is_file():
                shutil.copyfile(Path(tokenizer_folder) / name, partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """The generation_config.json of a model directory; None where it holds none."""
    path = Path(folder) / GENERATION_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> str:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    dtype = ""

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.shard", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        item = tensor.numel() * tensor.element_size()
        if shard and size + item > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().cpu().contiguous()
        size, total = size + item, total + item
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
    flush()
    if len(shards) == 1:
        (folder / "0.shard").rename(folder / WEIGHTS_FILE)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.shard").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtype


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as Hugging Face lays its JSON files out: indented, keys sorted."""
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
