"""The recipe: everything one run is told, from one YAML file and overrides on the command line."""

import difflib
from typing import Literal

from pydantic import Field, field_validator

from orchestrator.hardware import HardwareConfig
from shearing.config import Config
from shearing.data.config import CorpusConfig, MixtureConfig, ReferencesConfig, TrainedTokenizerConfig
from shearing.evaluation.config import TasksConfig, TextConfig
from shearing.models.shape import Shape
from shearing.pruning.config import PruningConfig
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.sparsity.config import SparsityConfig
from shearing.training.config import (
    EngineConfig,
    EvaluationConfig,
    RecoveryConfig,
    TrackerName,
    TrainingConfig,
    WatchdogConfig,
)

MethodSection = Literal["pruning", "slicing"]


class SourceTrainingConfig(TrainingConfig):
    """A source model trained from nothing on the corpus: for the quickstart and for studies."""

    shape: Shape
    tokenizer: TrainedTokenizerConfig


class SourceConfig(Config):
    """The model to start from: a Hugging Face directory, or one trained first."""

    model: str | None = Field(None, description="Hugging Face directory")
    trust_remote_code: bool = False
    train: SourceTrainingConfig | None = None


class ScoresConfig(Config):
    """What is measured of source and result at the end."""

    prompt_tokens: int = Field(256, ge=1)
    decode_tokens: int = Field(64, ge=1)
    batch_sequences: int = Field(1, ge=1)


class ScratchConfig(Config):
    """A model of the target's shape trained from nothing with recovery's schedule: the honest comparison."""

    learning_rate: float | None = Field(None, gt=0, description="Default: recovery's")
    warmup_steps: int | None = Field(None, ge=0, description="Default: recovery's; fresh weights want a longer one")


COMPARED_METHODS = (
    "learned", "cofi", "magnitude", "activation", "block_influence", "random", "slicegpt", "slicegpt_shared",
    "sparsegpt_2_4", "magnitude_2_4", "scratch",
)  # fmt: skip
"""What `pipelines/compare_methods.py` knows, in the order of its tables; `orchestrator.methods` says what each is."""


class ComparisonConfig(Config):
    """Methods side by side at equal parameters, each with and without the same recovery."""

    methods: list[str] | None = Field(
        None, min_length=1, description=f"Of {', '.join(COMPARED_METHODS)}; default: all that the source allows"
    )
    workers: int | None = Field(
        None, ge=1, description="Of each method's training; fewer than engine.workers let more methods run at once"
    )
    at_once: int | None = Field(
        None, ge=1, description="Methods beside each other; default: as many as the CPUs and GPUs hold"
    )
    text: TextConfig | None = Field(None, description="Perplexity on this text too")
    tasks: TasksConfig | None = Field(None, description="Tasks of the LM evaluation harness too")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str] | None) -> list[str] | None:
        for method in methods or []:
            if method not in COMPARED_METHODS:
                near = difflib.get_close_matches(method, COMPARED_METHODS, n=1)
                raise ValueError(
                    f"no method {method!r}; allowed: {', '.join(COMPARED_METHODS)}."
                    + (f" Did you mean {near[0]}?" if near else "")
                )
        return None if methods is None else list(dict.fromkeys(methods))


class Recipe(Config):
    """One run, whole. Of the sections `pruning` and `slicing` a run uses one: `only` takes the others out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    workspace: str | None = Field(None, description="Folder or URI of the run; default runs/<name>")
    seed: int = 17
    corpus: CorpusConfig
    source: SourceConfig
    references: ReferencesConfig = ReferencesConfig()
    mixture: MixtureConfig = MixtureConfig()
    engine: EngineConfig = EngineConfig()
    pruning: PruningConfig | None = None
    slicing: SlicingConfig | None = None
    sparsifying: SparsityConfig | None = None
    recovery: RecoveryConfig | None = None
    scratch: ScratchConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    scores: ScoresConfig = ScoresConfig()
    comparison: ComparisonConfig | None = None
    trackers: tuple[TrackerName, ...] = Field((), description="Where training is shown besides Ray's metrics")
    hardware: HardwareConfig | None = Field(None, description="Constants of the plan's forecast of time")

    def only(self, method: MethodSection) -> "Recipe":
        """The recipe of a run that uses one method: everything that runs, plans or reports reads off it which.

        A recipe without a section for slicing slices by that section's defaults, in a workspace of its own.
        """
        if method == "pruning":
            return self.model_copy(update={"slicing": None, "sparsifying": None})
        return self.model_copy(
            update={
                "pruning": None,
                "sparsifying": None,
                "slicing": self.slicing or SlicingConfig(),
                "scratch": None,  # no stock model has the shape of a sliced one
                "workspace": self.workspace or f"runs/{self.name}-sliced",
            }
        )
