"""One phase of training from its description: model, engine, data and gates put together, saved and restored.

Everything here runs the same in a plain process group and under Ray Train.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from shearing.config import Config
from shearing.data.config import MixtureConfig
from shearing.data.manifest import Split, load_manifest
from shearing.data.mixing import MixState
from shearing.data.mixture import initial_state
from shearing.data.source import SequenceSource
from shearing.errors import UserError
from shearing.evaluation.held_out import held_out_sequences
from shearing.models.directories import local_directory
from shearing.models.family import family_of
from shearing.models.flops import FROZEN_SHARE, peak_flops_per_s, training_flops_per_token
from shearing.models.loading import load_model, new_model, read_config
from shearing.pruning.config import PruningConfig
from shearing.pruning.gates import gates_for
from shearing.pruning.lagrangian import ExtraSteps, Lagrangian
from shearing.pruning.masks import attach_gates
from shearing.storage import open_store
from shearing.training.adapters import add_adapters
from shearing.training.batches import BatchStream, micro_batches_per_rank
from shearing.training.checkpoint import LORA_KEY, CheckpointReader, load_checkpoint, save_checkpoint
from shearing.training.config import (
    DistillationConfig,
    EngineConfig,
    EvaluationConfig,
    LoraConfig,
    TrackerName,
    TrainingConfig,
    WatchdogConfig,
)
from shearing.training.distillation import Teacher
from shearing.training.engine import DTYPES, Engine, deepspeed_config, partitioned_loading
from shearing.training.loop import MixtureClient, Report, Trainer, TrainState, Wish, no_wish
from shearing.training.mask_learning import MaskLearner
from shearing.training.watchdog import Watchdog
from shearing.training.zeros import keep_zeros

PhaseName = Literal["source", "pruning", "recovery", "scratch"]


class PhaseConfig(Config):
    """All that a worker needs to know of its phase; plain values, so that it travels to any node."""

    name: PhaseName
    model: str
    fresh: bool = False
    trust_remote_code: bool = False
    training: PruningConfig | TrainingConfig
    engine: EngineConfig
    evaluation: EvaluationConfig
    corpus: str
    split: Split
    proportions: dict[str, float]
    mixture: MixtureConfig
    references: dict[str, float]
    watchdog: WatchdogConfig = WatchdogConfig()
    seed: int
    distillation: DistillationConfig | None = None
    lora: LoraConfig | None = None
    keep_zeros: bool = False
    trackers: tuple[TrackerName, ...] = ()

    @property
    def pruning(self) -> PruningConfig | None:
        """The settings of mask learning, if that is what this phase is."""
        return self.training if isinstance(self.training, PruningConfig) else None


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this is, and its device."""

    rank: int
    world: int
    device: torch.device


def build_trainer(
    phase: PhaseConfig,
    place: Place,
    source: SequenceSource,
    mixture: MixtureClient,
    ask: Callable[[], Wish] = no_wish,
) -> Trainer:
    """Put a phase together at its first step. `restore` then moves it to a checkpoint's (collective).

    Raises UserError, on every rank alike, where the node of any lacks a model.
    """
    require_models(phase, place)
    corpus = open_store(phase.corpus)
    manifest = load_manifest(corpus)
    domains = list(phase.proportions)
    batch_sequences = phase.training.global_batch_tokens // manifest.sequence_tokens
    accumulation_steps = micro_batches_per_rank(batch_sequences, place.world, phase.engine.micro_batch_sequences)
    config = deepspeed_config(phase.training, phase.engine, accumulation_steps)
    # fresh weights are drawn whole: drawn part by part under ZeRO 3 they would be others than those of ZeRO 1 and 2
    kept = None if phase.fresh else partitioned_loading(config)
    torch.manual_seed(phase.seed)
    dtype, folder = DTYPES[phase.engine.dtype], local_directory(phase.model)
    if phase.fresh:
        model = new_model(read_config(folder), dtype, phase.seed)
    else:
        model = load_model(folder, dtype, phase.trust_remote_code)
    if phase.lora is not None:
        add_adapters(model, phase.lora, phase.seed)
    if phase.keep_zeros:
        keep_zeros(model)
    if phase.engine.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learner = _mask_learner(phase, model, place)
    engine = Engine(model, phase.training, config, place.device)
    del kept
    teacher = _teacher(phase, dtype, place)  # after `kept` is gone, or ZeRO 3 would part it among the workers
    splits = {domain: manifest.domains[domain][phase.split] for domain in domains}
    held_out = held_out_sequences(corpus, phase.evaluation.sequences_per_domain)
    repeats = phase.mixture.on_exhausted == "next_epoch"
    stream = BatchStream(
        source, splits, batch_sequences, seed=phase.seed, rank=place.rank, world=place.world, repeats=repeats
    )
    return Trainer(
        phase.training,
        engine,
        stream=stream,
        mixture=mixture,
        held_out={domain: held_out[domain] for domain in domains},
        references=phase.references,
        state=TrainState(0, MixState.start(domains), initial_state(phase.mixture, phase.proportions)),
        watchdog=Watchdog(phase.watchdog),
        learner=learner,
        micro_batch_sequences=phase.engine.micro_batch_sequences,
        loss_from=phase.mixture.loss_from,
        teacher=teacher,
        lora=phase.lora,
        ask=ask,
    )


def require_models(phase: PhaseConfig, place: Place) -> None:
    """Raise UserError on every rank where the node of any lacks a model (collective).

    A rank that left because of what it alone had found would be waited for in the others' next collective.
    """
    teacher = phase.distillation.teacher if phase.distillation is not None else None
    mine = ("", "")
    try:
        for model in filter(None, (phase.model, teacher)):
            read_config(local_directory(model))
    except UserError as error:
        mine = (str(error), socket.gethostname())
    found = [mine] * place.world
    dist.all_gather_object(found, mine)
    nodes: dict[str, set[str]] = {}
    for problem, node in filter(any, found):
        nodes.setdefault(problem, set()).add(node)
    if nodes:
        raise UserError([f"{problem} {_seen_on(sorted(where))}" for problem, where in nodes.items()])


def _seen_on(nodes: list[str]) -> str:
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return f"This is so on {', '.join(nodes[:3])}{more}; every node with workers has to see it under that name."


def start_report(phase: PhaseConfig, trainer: Trainer) -> Report:
    """What holds for all steps that one life of the workers makes, for the log.

    FLOPs are the model's own, without a teacher's; the peak is of one worker's device, None where it is not known.
    """
    config = trainer.engine.model.config
    sequence_tokens = phase.training.global_batch_tokens // trainer.stream.batch_sequences
    device = trainer.engine.device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "kind": "start",
        "step": trainer.state.step,
        "time": time.time(),
        "workers": trainer.stream.world,
        "device": device_name,
        "planned_steps": phase.training.steps,
        "sequences": trainer.stream.sequences,
        "flops_per_token": training_flops_per_token(config, sequence_tokens) * (FROZEN_SHARE if trainer.lora else 1),
        "peak_flops_per_s": peak_flops_per_s(device_name, phase.engine.dtype),
    }


def _teacher(phase: PhaseConfig, dtype: torch.dtype, place: Place) -> Teacher | None:
    config = phase.distillation
    if config is None:
        return None
    assert config.teacher is not None, "whoever makes the phase knows the source model"
    model = load_model(local_directory(config.teacher), dtype, phase.trust_remote_code)
    return Teacher(model, config, place.device)


def _mask_learner(phase: PhaseConfig, model: torch.nn.Module, place: Place) -> MaskLearner | None:
    config = phase.pruning
    if config is None:
        return None
    model_config = read_config(local_directory(phase.model))
    gates, options = gates_for(model_config, config, phase.seed), config.gates
    gates.to(place.device)
    extra = ExtraSteps(config.steps, options.extra_penalty_growth)
    lagrangian = Lagrangian(
        gates.goals, options.sparsity_warmup_steps, options.start_sparsity, extra, options.initial_quadratic
    )
    lagrangian.to(place.device)
    return MaskLearner(
        gates, lagrangian, attach_gates(model, family_of(model_config)), config, seed=phase.seed, rank=place.rank
    )


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part of a checkpoint (collective).

    Raises SequenceRepeatedError if data came twice, TrainingDivergedError if the weights are not worth keeping.
    """
    trainer.require_sound()
    consumed = merged_bitmaps(trainer)
    for domain in trainer.domains:
        drawn = trainer.state.mix.drawn[domain]
        trainer.consumed.check(domain, consumed, drawn)
    arrays: dict[str, dict[str, Any]] = {"consumed": consumed}
    if trainer.learner:
        arrays["gates"] = trainer.learner.tensors()
    state = trainer.state.to_json() | {"watchdog": trainer.watchdog.to_json()}
    if trainer.lora is not None:
        state[LORA_KEY] = trainer.lora.model_dump(mode="json")
    save_checkpoint(trainer.engine, folder, state, arrays)


def restore(trainer: Trainer, reader: CheckpointReader) -> None:
    """Move a freshly built trainer to where a checkpoint stands, whatever workers wrote it (collective)."""
    state = reader.state()
    trainer.state = TrainState.from_json(state)
    trainer.watchdog.load(state["watchdog"])
    load_checkpoint(trainer.engine, reader, trainer.state.step)
    if trainer.learner:
        trainer.learner.load({name: torch.from_numpy(value) for name, value in reader.arrays("gates").items()})
    if trainer.stream.rank == 0:  # one rank keeps the past; sums over ranks are the whole
        trainer.consumed.load(reader.arrays("consumed"))


def merged_bitmaps(trainer: Trainer) -> dict[str, np.ndarray]:
    """The bitmaps of all ranks together, by `domain/epoch` (collective).

    They are added, byte by byte: bits of different ranks never coincide, and where they did the carry gives a count
    that `ConsumedSequences.check` refuses.
    """
    mine = trainer.consumed.tensors()
    names: list[list[str]] = [[] for _ in range(trainer.stream.world)]
    dist.all_gather_object(names, sorted(mine))
    merged = {}
    for name in sorted({name for part in names for name in part}):
        size = -(-trainer.stream.sequences[name.rpartition("/")[0]] // 8)
        bitmap = torch.from_numpy(mine.get(name, np.zeros(size, dtype=np.uint8)).copy()).to(trainer.engine.device)
        dist.all_reduce(bitmap)
        merged[name] = bitmap.cpu().numpy()
    return merged
