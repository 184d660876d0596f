"""What a recipe says about training: the schedule of one phase, and the engine that all phases share."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shearing.config import Config

AdaptedHalf = Literal["attention", "mlp"]


class TrainingConfig(Config):
    """One phase of training: its length, batch, optimiser and schedule."""

    steps: int = Field(ge=1)
    global_batch_tokens: int = Field(ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    final_learning_rate_fraction: float = Field(
        0.1, ge=0, le=1, description="The cosine ends at this share of the peak"
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    evaluate_every_steps: int = Field(
        50, ge=1, description="Held-out evaluation and, with mixture.loss_from = eval, mixture update"
    )
    update_mixture_every_steps: int | None = Field(
        None, ge=1, description="With mixture.loss_from = train only; default: evaluate_every_steps"
    )
    checkpoint_every_steps: int = Field(100, ge=1)

    @property
    def most_steps(self) -> int:
        """Steps that the phase may take at most."""
        return self.steps


class WatchdogConfig(Config):
    """When a training phase is stopped because it goes nowhere; a loss or gate that is no number always stops it."""

    loss_ratio: float = Field(2.0, ge=1, description="A loss over this many times the running median, and")
    loss_margin_nats: float = Field(1.0, ge=0, description="this much more, is bad;")
    loss_steps: int = Field(5, ge=1, description="so many bad steps in a row stop the phase")
    median_steps: int = Field(50, ge=1, description="Steps of the running median")
    least_kept_share: float = Field(
        0.1, ge=0, lt=1, description="Gates that keep less than this share of what their target leaves are bad;"
    )
    sparsity_steps: int = Field(20, ge=1, description="so many bad steps in a row stop the phase")


class DistillationConfig(Config):
    """Learning from a teacher: (1 - weight) CE + weight T^2 KL(teacher || student) (arXiv 1503.02531, section 2)."""

    weight: float = Field(0.5, ge=0, le=1, description="Of the teacher; 1 leaves the text's own next token out")
    temperature: float = Field(1.0, gt=0, description="Logits of both are divided by it")
    teacher: str | None = Field(
        None, description="Hugging Face directory of the same vocabulary; default: the source model"
    )


class LoraConfig(Config):
    """Low-rank adapters trained in place of the weights (arXiv 2106.09685, by PEFT): W + alpha / rank * B A.

    The defaults are SliceGPT's for recovery (arXiv 2401.15024, section 4).
    """

    rank: int = Field(32, ge=1)
    alpha: int = Field(10, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1, description="Of the adapters' input, in training only")
    targets: list[AdaptedHalf] = Field(["attention", "mlp"], min_length=1, description="All linears of these")
    learning_rate: float = Field(2e-4, gt=0, description="Of the adapters, in place of recovery.learning_rate")
    merge: bool = Field(True, description="Add the adapters to the weights at the end, or keep them as files beside")


class RecoveryConfig(TrainingConfig):
    """Continued pretraining of the smaller model."""

    distillation: DistillationConfig | None = None
    lora: LoraConfig | None = Field(None, description="Train adapters alone; default: every weight")


class WorkerRange(Config):
    """As many workers as there is room for: fewer when nodes leave, more at a checkpoint once nodes have come."""

    min: int = Field(1, ge=1, description="With room for fewer, training waits")
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min is above max; set min to at most {self.max}")
        return self


class EngineConfig(Config):
    """The workers of every training phase and how DeepSpeed runs on them."""

    workers: Annotated[int, Field(ge=1)] | WorkerRange = Field(1, description="A number, or {min: a, max: b}")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    zero_stage: Literal[1, 2, 3] = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    micro_batch_sequences: int = Field(1, ge=1, description="Sequences of one forward pass on one worker")
    activation_checkpointing: bool = False
    max_failures: int = Field(3, ge=-1, description="Worker failures that a phase survives; -1 is without limit")

    @model_validator(mode="after")
    def _a_device_each(self) -> "EngineConfig":
        """DeepSpeed and NCCL want one device for each worker of a node, numbered as the workers are."""
        shared = self.gpus_per_worker % 1 and self.most_workers > 1
        if self.gpus_per_worker > 1 or shared:
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; a worker trains on one GPU, and several cannot share "
                "one; allowed: 0, 1, and a part of one for a single worker. Set gpus_per_worker to 1, and workers to "
                "the number of GPUs"
            )
        return self

    @property
    def least_workers(self) -> int:
        """Workers without which training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """Workers where there is room for all."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class EvaluationConfig(Config):
    """The held-out evaluation that steers the mixture, and the scores at the end."""

    sequences_per_domain: int = Field(64, ge=1)
