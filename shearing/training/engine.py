"""DeepSpeed ZeRO behind a few verbs: logits, accumulate, and every parameter by its name.

Shapes: B sequences of a micro-batch, T tokens.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shearing.training.config import EngineConfig, TrainingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_deepspeed() -> torch.device:
    """Choose the accelerator and join DeepSpeed to the process group that already runs. Returns this rank's device.

    On CPU the shared-memory communication op is switched off: it would be compiled at first use, for a minute.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def deepspeed_config(training: TrainingConfig, engine: EngineConfig, accumulation_steps: int) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The gradient clip is always given: its default is not "none". DeepSpeed's own clock is off: it would wait for the
    device before and after every micro-batch.
    """
    return {
        "train_micro_batch_size_per_gpu": engine.micro_batch_sequences,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**12,
    }


def partitioned_loading(config: dict[str, Any]) -> object | None:
    """Under ZeRO 3, make `from_pretrained` load models partitioned from the start.

    The object returned must be kept alive while the model is made. None for the other stages.
    """
    if config["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


@dataclass(frozen=True)
class NamedState:
    """One parameter whole, in float32 on the engine's device: its value and its Adam moments."""

    name: str
    value: torch.Tensor
    moments: dict[str, torch.Tensor]


class Engine:
    """A model under DeepSpeed ZeRO 1, 2 or 3 with AdamW; every rank calls every method together."""

    def __init__(
        self, model: nn.Module, training: TrainingConfig, config: dict[str, Any], device: torch.device
    ) -> None:
        import deepspeed

        self.stage = int(config["zero_optimization"]["stage"])
        self.device = device
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=device.type == "cuda",
        )
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.zero = self.deepspeed.optimizer

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model inside."""
        module: nn.Module = self.deepspeed.module
        return module

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, T, V] in the model's dtype."""
        output: torch.Tensor = self.deepspeed(input_ids=tokens_BT, use_cache=False).logits
        return output

    def begin_update(self, learning_rate: float) -> None:
        """Set the learning rate of the update that the next micro-batches make."""
        for group in self.zero.param_groups:
            group["lr"] = learning_rate

    def accumulate(self, loss: torch.Tensor, before_update: Callable[[], None] = lambda: None) -> None:
        """Backward of one micro-batch's mean loss; after the last one of a batch the update happens by itself."""
        self.deepspeed.backward(loss)
        if self.deepspeed.is_gradient_accumulation_boundary():
            before_update()
        self.deepspeed.step()

    def gradient_norm(self) -> float:
        """Norm of the last update's gradient over all parameters, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters by their Hugging Face names, tied ones once; partitioned under ZeRO 3."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def states(self) -> Iterator[NamedState]:
        """Every parameter whole, one after another, gathered on all ranks (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in ADAM_MOMENTS}
            yield NamedState(name, value, moments)

    def begin_loading(self, step: int) -> None:
        """Make empty Adam state for `step` finished updates; `load` then fills it parameter by parameter."""
        flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for flat in flats:
            self.zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if flat.is_cuda else None),
                **{key: torch.zeros_like(flat) for key in ADAM_MOMENTS},
            }
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def load(self, parameter: nn.Parameter, value: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        """Set one parameter and its Adam moments from whole float32 tensors, the same on every rank."""
        for key, full in ((None, value), *moments.items()):
            if self.stage == 3:
                self._load_partition(parameter, full, key)
            else:
                parameter.set_full_hp_param(full.to(self.device), key)  # type: ignore[attr-defined]
                if key is None:
                    parameter.data.copy_(full)

    def _load_partition(self, parameter: nn.Parameter, full: torch.Tensor, key: str | None) -> None:
        # DeepSpeed's own setter of whole values fails where the size does not divide by the world size
        partition = parameter.ds_tensor  # type: ignore[attr-defined]
        size = partition.numel()
        flat = nn.functional.pad(full.flatten(), (0, size * dist.get_world_size() - full.numel()))
        mine = flat.narrow(0, size * dist.get_rank(), size).to(self.device)
        self.zero.set_local_hp_param(mine, parameter, key)
        if key is None:
            partition.data.copy_(mine)
