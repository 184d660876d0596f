"""LoRA adapters by PEFT: put on a model to be trained, then added to its weights or written beside them.

Source: arXiv 2106.09685, section 4.1: W + alpha / rank * B A with B of zeros and A random at first.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, inject_adapter_in_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shearing.models.families import Family
from shearing.models.family import family_of
from shearing.models.parameters import projection_modules
from shearing.training.config import LoraConfig

ADAPTER = "default"  # PEFT's name of an adapter that has none; part of parameter names in memory, not in files


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Put fresh adapters on every linear that `lora` targets, and freeze all else, in place.

    They are drawn from `seed` alone, so that all ranks and ZeRO stages start from the same ones; global random state
    is left alone. Their dtype is the weights' own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(family_of(model.config), lora), model, ADAPTER)
    model.train(model.training)  # new modules would drop out in a model that evaluates


def _peft_config(family: Family, lora: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=projection_modules(family, lora.targets),
    )


def merged_tensors(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: LoraConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Weights with their adapters added in float32, one after another, rounded to `dtype`.

    Args:
        weights: Of the model that the adapters were put on, by name.
        adapters: By their names in memory: `<module>.lora_A.default.weight` [rank, columns] and its `lora_B` [rows,
            rank].
        lora: As they were trained with.
        dtype: Of what is returned.
    """
    for name in weights:
        weight, (down, up) = weights[name], _names(name.removesuffix(".weight"))
        if down in adapters:
            product = adapters[up].float() @ adapters[down].float()
            weight = weight.float() + lora.alpha / lora.rank * product
        yield name, weight.to(dtype)


def _names(module: str) -> tuple[str, str]:
    return f"{module}.lora_A.{ADAPTER}.weight", f"{module}.lora_B.{ADAPTER}.weight"


def write_adapters(
    folder: Path, base: Path, base_config: Mapping[str, object], adapters: Mapping[str, Tensor], lora: LoraConfig
) -> None:
    """Fill an empty folder with a model's files as they are and its adapters beside them, as PEFT names both files.

    `AutoModelForCausalLM.from_pretrained` loads such a folder with the adapters applied; `peft.PeftModel` takes it as
    adapters for a model that was loaded from elsewhere.
    """
    for path in sorted(base.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = _peft_config(family_of(base_config), lora)
    config.base_model_name_or_path, config.inference_mode = ".", True
    config.save_pretrained(str(folder))
    stored = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": adapters[name].contiguous() for name in adapters}
    save_file(stored, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    assert (folder / CONFIG_NAME).is_file()
