"""What a recipe says about mask learning."""

from typing import Literal

from pydantic import Field

from shearing.config import Config
from shearing.models.shape import TargetShape
from shearing.training.config import TrainingConfig

GateGroup = Literal["layer", "hidden", "head", "kv_head", "intermediate"]


class GatesConfig(Config):
    """Hard-concrete gates and their Lagrangian constraint (arXiv 2310.06694, section 2.1)."""

    groups: list[GateGroup] | None = Field(None, description="Default: every group whose dimension the target changes")
    learning_rate: float = Field(1.0, gt=0, description="Of gates and multipliers; its schedule is constant")
    sparsity_warmup_steps: int = Field(640, ge=0)
    start_sparsity: float = Field(0.0, ge=0, lt=1)
    initial_log_alpha: float = Field(3.0, description="Below the clamp at log 100, so that gates start distinct")
    initial_log_alpha_std: float = Field(0.1, ge=0)
    noise: Literal["shared", "per_rank"] = Field("shared", description="One draw of gates for all ranks, or one each")
    tolerance: float = Field(
        0.01, gt=0, description="Largest gap of expected to target sparsity that counts as reached"
    )


class PruningConfig(TrainingConfig):
    """Mask learning: a training phase with gates over the units of the source model."""

    target: TargetShape
    gates: GatesConfig = GatesConfig()
