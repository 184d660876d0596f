"""What a recipe says about choosing what to keep."""

import math
from typing import Literal

from pydantic import Field

from shearing.config import Config
from shearing.models.shape import Shape, TargetShape
from shearing.training.config import TrainingConfig

GateGroup = Literal["layer", "hidden", "head", "kv_head", "intermediate", "attention_layer", "mlp_layer"]
Method = Literal["learned", "magnitude", "activation", "block_influence", "random"]


class GatesConfig(Config):
    """Hard-concrete gates and their Lagrangian constraint (arXiv 2310.06694, section 2.1)."""

    groups: list[GateGroup] | None = Field(None, description="Default: every group whose dimension the target changes")
    learning_rate: float = Field(1.0, gt=0, description="Of gates; its schedule is constant")
    multiplier_learning_rate: float | None = Field(None, gt=0, description="Of the multipliers; default that of gates")
    initial_quadratic: float = Field(
        0.0,
        ge=0,
        description="Quadratic multipliers at the begin (linear ones: 0); more than 0 keeps from overshooting",
    )
    sparsity_warmup_steps: int = Field(640, ge=0)
    start_sparsity: float = Field(0.0, ge=0, lt=1)
    initial_log_alpha: float = Field(3.0, description="Below the clamp at log 100, so that gates start distinct")
    initial_log_alpha_std: float = Field(0.1, ge=0)
    noise: Literal["shared", "per_rank"] = Field("shared", description="One draw of gates for all ranks, or one each")
    tolerance: float = Field(
        0.01, gt=0, description="Largest gap of expected to target sparsity that counts as reached"
    )
    extra_steps: int | None = Field(
        None, ge=0, description="At most so many after the last while a gap is wider; default a fifth of steps"
    )
    extra_penalty_growth: float = Field(1.1, ge=1, description="Of the penalty on the gap, with each extra step")


class PruningTarget(TargetShape):
    """The shape asked for; or, without one, how much has to go wherever that is (CoFi, arXiv 2204.00408)."""

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="Share of all prunable parameters that goes; layers end uneven"
    )
    parameters: int | None = Field(
        None, ge=1, description="At most so many stay in all, embeddings and norms included; layers end uneven"
    )

    @property
    def is_overall(self) -> bool:
        """Whether one bound on parameters stands in place of sizes."""
        return self.sparsity is not None or self.parameters is not None

    def within(self, source: Shape) -> Shape:
        """The full shape that this target means for a given source; the source's own where it is one bound on all."""
        return TargetShape(**self.model_dump(include=set(TargetShape.model_fields))).within(source)


class LayerList(Config):
    """Layers whose fate is not left to the method."""

    layers: list[int] = Field([], description="Numbers from 0; negative ones count from the end")


class CalibrationConfig(Config):
    """The text on which every method but `learned` and `magnitude` measures."""

    sequences: int = Field(128, ge=1, description="Of the prune split, from all domains by their proportions")


class PruningConfig(TrainingConfig):
    """Which units of the source model stay: learned by a training phase with gates, or chosen at once."""

    method: Method = "learned"
    target: PruningTarget
    keep: LayerList = Field(LayerList(), description="Forced to stay")
    drop: LayerList = Field(LayerList(), description="Forced to go")
    gates: GatesConfig = GatesConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def most_steps(self) -> int:
        """Steps with all extra ones."""
        extra = self.gates.extra_steps
        return self.steps + (math.ceil(0.2 * self.steps) if extra is None else extra)
