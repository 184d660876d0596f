"""Whole phases of training in the processes of a group, as Ray Train runs them but without Ray."""

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny_corpus import write_corpus

from shearing.data.manifest import load_manifest
from shearing.data.mixture import MixtureState, next_state
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import make_orders
from shearing.models.family import llama_config
from shearing.models.loading import model_tensors, new_model, write_model_directory
from shearing.models.shape import Shape
from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.loop import Wish, no_wish, training_reports
from shearing.training.phase import PhaseConfig, Place, build_trainer, restore, save

VOCABULARY = 97
SEQUENCE_TOKENS = 32
BATCH_SEQUENCES = 8
# Odd everywhere: no weight's size divides by two, so ZeRO 3 pads each of them, and flat buffers break inside weights.
SHAPE = Shape(num_layers=3, hidden_size=45, num_heads=9, num_kv_heads=3, head_size=4, intermediate_size=49)
TARGET = {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}
PROPORTIONS = {"a": 0.5, "b": 0.3, "c": 0.2}
REFERENCES = {"a": 2.0, "b": 3.0, "c": 4.0}
SEQUENCES = {"a": 20, "b": 33, "c": 40}  # `a` goes through more than one epoch in six steps


@dataclass(frozen=True)
class TinyRun:
    """Folders of a corpus and of two models: `model`, and `tied`, whose head is its embedding table."""

    corpus: str
    model: str
    tied: str

    @classmethod
    def write(cls, folder):
        write_corpus(folder / "corpus", SEQUENCES, sequence_tokens=SEQUENCE_TOKENS, vocab_size=VOCABULARY)
        for name in ("model", "tied"):
            config = llama_config(SHAPE, VOCABULARY, 2 * SEQUENCE_TOKENS, eos_token_id=1, tied=name == "tied")
            model = new_model(config, seed=5)
            with torch.no_grad():  # far from the initial values, where every loss is log(vocabulary)
                for parameter in model.parameters():
                    parameter.mul_(3 if parameter.ndim > 1 else 1)
            write_model_directory(folder / name, config, model_tensors(model))
        return cls(str(folder / "corpus"), str(folder / "model"), str(folder / "tied"))

    def phase(self, *, pruning=False, stage=1, dtype="float32", model=None, engine=None, training=None, **changed):
        """A phase of six steps with evaluations at 2, 4 and 6, two micro-batches a step on two workers."""
        settings = {
            "steps": 6,
            "global_batch_tokens": BATCH_SEQUENCES * SEQUENCE_TOKENS,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "evaluate_every_steps": 2,
        }
        if pruning:
            settings["target"] = TARGET
            settings["gates"] = {"sparsity_warmup_steps": 3, "learning_rate": 0.3, "extra_steps": 0}
        values = {
            "name": "pruning" if pruning else "recovery",
            "model": model or self.model,
            "training": settings | (training or {}),
            "engine": {"workers": 2, "zero_stage": stage, "dtype": dtype, "micro_batch_sequences": 2} | (engine or {}),
            "evaluation": {"sequences_per_domain": 5},
            "corpus": self.corpus,
            "split": "prune" if pruning else "train",
            "proportions": PROPORTIONS,
            "mixture": {"rule": "sheared"},
            "references": REFERENCES,
            "seed": 3,
        }
        return PhaseConfig(**values | changed)


class LocalMixture:
    """The rule of the phase without its actor."""

    def __init__(self, phase):
        self.phase = phase

    def submit(self, step, base, sums):
        total = torch.tensor([sums[domain] for domain in sums], dtype=torch.float64)
        dist.all_reduce(total)
        losses = {d: s / n if n else None for d, (s, n) in zip(sums, total.tolist(), strict=True)}
        phase = self.phase
        return next_state(base, losses, phase.references, phase.mixture, phase.proportions, step=step)


class PlannedMixture:
    """Proportions by step, whatever the losses."""

    def __init__(self, proportions_by_step):
        self.proportions_by_step = proportions_by_step

    def submit(self, step, base, sums):
        return MixtureState(version=base.version + 1, step=step, proportions=self.proportions_by_step[step])


@dataclass
class Run:
    """What one rank saw: all reports, the draws of each step, and what it held at the end (rank 0 only)."""

    reports: list
    draws: dict
    fetched: list
    tensors: dict
    gates: dict

    def of_kind(self, kind, after=-1):
        return [report for report in self.reports if report["kind"] == kind and report["step"] > after]

    def history(self, after=-1):
        """All figures of the run that do not come from a clock."""
        timed = {"time", "tokens_per_s", "step_s", "mixture_wait_s", "seconds"}
        timed |= {"data_wait_s", "forward_backward_s", "communication_s", "update_s"}
        return [
            {key: value for key, value in report.items() if key not in timed}
            for report in self.reports
            if report["step"] > after
        ]


class WatchedSource:
    """Passes on what Parquet holds, and remembers what was asked for."""

    def __init__(self, phase):
        store = open_store(phase.corpus)
        orders = make_orders(load_manifest(store), phase.split, list(phase.proportions), phase.seed)
        self.source, self.fetched = ParquetSource(store, orders), []

    def fetch(self, draws):
        self.fetched.append(list(draws))
        return self.source.fetch(draws)


def new_trainer(rank, world, phase, mixture=None, ask=no_wish):
    place = Place(rank, world, torch.device("cpu"))
    return build_trainer(phase, place, WatchedSource(phase), mixture or LocalMixture(phase), ask)


def checkpoints_asked_for(rank, world, phase, wishes):
    """Steps after which a checkpoint was due, and the wish then; `wishes`: rank -> step -> what that rank asks."""
    asked = iter(range(1, phase.training.steps + 1))
    trainer = new_trainer(rank, world, phase, ask=lambda: wishes.get(rank, {}).get(next(asked), Wish()))
    return [
        (report["step"], trainer.wish)
        for report in training_reports(trainer)
        if trainer.settled(report) and trainer.checkpoint_due()
    ]


def run_phase(rank, world, phase, *, resume=None, save_after=None, folder=None, mixture=None, until=None):
    """A phase from its start or a checkpoint to its end (or `until` a step); saved once after step `save_after`."""
    gc.collect()  # engines hold themselves in cycles
    trainer = new_trainer(rank, world, phase, mixture)
    if resume is not None:
        restore(trainer, CheckpointReader(open_store(resume)))
    run, following = Run([], {}, [], {}, {}), trainer.next_batch

    def next_batch():
        batch = following()
        run.draws[trainer.state.step] = batch.draws
        return batch

    trainer.next_batch = next_batch
    for report in training_reports(trainer):
        run.reports.append(report)
        if trainer.settled(report) and report["step"] == save_after:
            save_all(trainer, folder)
        if trainer.settled(report) and report["step"] == until:
            break
    run.fetched = trainer.stream.source.fetched
    run.tensors = engine_tensors(trainer)
    run.gates = trainer.learner.tensors() if trainer.learner else {}
    if rank > 0:
        run.tensors = run.gates = {}
    return run


def engine_tensors(trainer):
    """Weights and moments by name, whole (collective)."""
    tensors = {}
    for state in trainer.engine.states():
        tensors[state.name] = state.value.clone()
        tensors |= {f"{state.name}::{key}": moment.clone() for key, moment in state.moments.items()}
    return tensors


def save_all(trainer, folder):
    """Every rank writes to a folder of its own, as on machines of their own; storage then holds all of them."""
    own = Path(f"{folder}-of-rank-{dist.get_rank()}")
    own.mkdir(parents=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(trainer, own)
    for path in own.iterdir():
        assert not (Path(folder) / path.name).exists(), f"two ranks wrote {path.name}"
        path.rename(Path(folder) / path.name)
    dist.barrier()


def largest_difference(one, other):
    """Over all tensors of two dicts with the same names."""
    assert set(one) == set(other)
    return max(float(np.abs(np.asarray(one[name]) - np.asarray(other[name])).max()) for name in one)
