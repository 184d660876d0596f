"""The recipe: everything one run is told, from one YAML file and overrides on the command line."""

from pydantic import Field

from shearing.config import Config
from shearing.data.config import CorpusConfig, MixtureConfig, ReferencesConfig, TrainedTokenizerConfig
from shearing.models.shape import Shape
from shearing.pruning.config import PruningConfig
from shearing.training.config import (
    EngineConfig,
    EvaluationConfig,
    RecoveryConfig,
    TrackerName,
    TrainingConfig,
    WatchdogConfig,
)


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


class Recipe(Config):
    """One run, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    workspace: str | None = Field(None, description="Folder or URI of the run; default runs/<name>")
    seed: int = 17
    corpus: CorpusConfig
    source: SourceConfig
    references: ReferencesConfig = ReferencesConfig()
    mixture: MixtureConfig = MixtureConfig()
    engine: EngineConfig = EngineConfig()
    pruning: PruningConfig | None = None
    recovery: RecoveryConfig | None = None
    scratch: ScratchConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    scores: ScoresConfig = ScoresConfig()
    trackers: tuple[TrackerName, ...] = Field((), description="Where training is shown besides Ray's metrics")
