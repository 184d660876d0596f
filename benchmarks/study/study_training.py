"""One task of the study in one process: the product's own phases, streams from Parquet, no Ray around them."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from study_tasks import RESULT, Task

from orchestrator.phases import choosing_config, export_config, phase_config
from orchestrator.recipe import Recipe
from orchestrator.source_model import trained_source_config
from shearing.data.manifest import TOKENIZER_FOLDER, load_manifest
from shearing.data.mixture import MixtureState, next_state
from shearing.data.parquet_source import ParquetSource
from shearing.data.source import make_orders
from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import LossSums, domain_loss_sums, mean_losses
from shearing.evaluation.throughput import Load, measure_speeds
from shearing.models.loading import load_model, read_config, write_json
from shearing.models.parameters import count_parameters
from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.choosing import choose_and_write
from shearing.training.engine import prepare_deepspeed
from shearing.training.export import ExportConfig, export_model
from shearing.training.loop import Trainer, summed_losses, training_reports
from shearing.training.phase import PhaseConfig, PhaseName, Place, build_trainer, restore, save
from shearing.training.shrinking import extract_model

ROWS = "rows.json"
"""Of the reports so far, in a checkpoint."""

SCORED_SEQUENCES = 48
"""Of each domain, for the final losses; evaluations on the way are smaller."""

Rows = list[dict[str, Any]]


class LocalMixture:
    """The mixture's rule for a single process."""

    def __init__(self, phase: PhaseConfig) -> None:
        self.phase = phase

    def submit(self, step: int, base: MixtureState, sums: LossSums) -> MixtureState:
        """The version after `base`."""
        phase, losses = self.phase, summed_losses(sums, torch.device("cpu"))
        references = phase.references or dict.fromkeys(phase.proportions, 0.0)  # a source model has none yet
        return next_state(base, losses, references, phase.mixture, phase.proportions, step=step)


@contextlib.contextmanager
def single_process() -> Iterator[torch.device]:
    """A process group of one, and its device."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks its launcher's variable
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield prepare_deepspeed()
        finally:
            dist.destroy_process_group()


def run_task(task: Task, recipe: Recipe, corpus: str, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Carry one task out; its model goes to `folder/model`.

    Args:
        task: What to do.
        recipe: With the task's overrides.
        corpus: URI of the prepared corpus.
        folder: The task's own.
        models: Folders of the models of `task.models`, by task name.
    """
    began_s = time.perf_counter()
    result = _BODIES[task.kind](task, recipe, corpus, folder, models)
    return result | {"seconds": time.perf_counter() - began_s}


def _source(_task: Task, recipe: Recipe, corpus: str, folder: Path, _models: dict[str, Path]) -> dict[str, Any]:
    manifest = load_manifest(open_store(corpus))
    shape = folder / "shape"
    shape.mkdir(parents=True, exist_ok=True)
    tokenizer = manifest.tokenizer
    write_json(shape / "config.json", trained_source_config(recipe, tokenizer.vocab_size, tokenizer.boundary_token_id))
    for path in Path(open_store(corpus).child(TOKENIZER_FOLDER).path).iterdir():
        (shape / path.name).write_bytes(path.read_bytes())
    phase = phase_config(recipe, "source", model=str(shape), source=str(shape), corpus=corpus, references={})
    rows = _train(phase, folder / "checkpoint")
    export_model(_export(recipe, folder, shape, corpus))
    return _scored(folder / "model", corpus) | {"rows": rows}


def _prune(task: Task, recipe: Recipe, corpus: str, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    source = models[task.models[0]]
    began_s = time.perf_counter()
    assert recipe.pruning is not None
    if recipe.pruning.method == "learned":
        rows = _train(_phase(recipe, "pruning", source, corpus, models), folder / "checkpoint")
    else:
        rows = []
        chosen = str(folder / "checkpoint")
        choose_and_write(choosing_config(recipe, source=str(source), destination=chosen, corpus=corpus))
    choosing_s = time.perf_counter() - began_s
    outcome = extract_model(_export(recipe, folder, source, corpus).model_copy(update={"pruning": recipe.pruning}))
    proof = {name: losses["mean"] for name, losses in outcome["proof"].items()}
    return _scored(folder / "model", corpus) | {"proof": proof, "rows": rows, "choosing_s": choosing_s}


def _recover(task: Task, recipe: Recipe, corpus: str, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    pruned = models[task.models[0]]
    phase = _phase(recipe, "scratch" if task.fresh else "recovery", pruned, corpus, models)
    rows = _train(phase, folder / "checkpoint")
    export_model(_export(recipe, folder, pruned, corpus))
    return _scored(folder / "model", corpus) | {"rows": rows, "references": phase.references}


def _speed(task: Task, recipe: Recipe, corpus: str, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    del folder, corpus
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = {name: load_model(models[name]).to(device) for name in task.models}
    scores = recipe.scores
    load = Load(scores.prompt_tokens, scores.decode_tokens, scores.batch_sequences)
    speeds = measure_speeds(loaded, load, device, repeats=9)
    return {
        "speeds": {
            name: {"prefill": speed.prefill_tokens_per_s.median, "decode": speed.decode_tokens_per_s.median}
            for name, speed in speeds.items()
        }
    }


_BODIES = {"source": _source, "prune": _prune, "train": _recover, "speed": _speed}


def _phase(recipe: Recipe, name: PhaseName, model: Path, corpus: str, models: dict[str, Path]) -> PhaseConfig:
    """A phase after the source's, whose model is the teacher and gives the references, as its result says them."""
    source = models["source"]
    references = json.loads((source.parent / RESULT).read_text())["losses"]
    return phase_config(recipe, name, model=str(model), source=str(source), corpus=corpus, references=references)


def _train(phase: PhaseConfig, checkpoint: Path) -> Rows:
    """The phase to its last step, from its checkpoint if there is one; what its reports said that figures need."""
    kept = ("kind", "step", "loss", "losses", "proportions", "seconds", "step_s")
    store, rows = open_store(phase.corpus), []
    orders = make_orders(load_manifest(store), phase.split, list(phase.proportions), phase.seed)
    with single_process() as device:
        trainer = build_trainer(phase, Place(0, 1, device), ParquetSource(store, orders), LocalMixture(phase))
        if checkpoint.is_dir():
            restore(trainer, CheckpointReader(open_store(str(checkpoint))))
            rows = json.loads((checkpoint / ROWS).read_text())
        for report in training_reports(trainer):
            rows.append({key: report[key] for key in kept if key in report})
            if phase.name == "source" and report["kind"] == "evaluation":
                mean_loss = sum(report["losses"].values()) / len(report["losses"])
                print(f"source: step {report['step']:,} of {phase.training.steps:,}, {mean_loss:.4f}", flush=True)
            if trainer.settled(report) and trainer.checkpoint_due():
                _keep(trainer, rows, checkpoint)
    return rows


def _keep(trainer: Trainer, rows: Rows, checkpoint: Path) -> None:
    """Replace the checkpoint, whole or not at all."""
    partial = checkpoint.with_name("checkpoint.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(trainer, partial)
    (partial / ROWS).write_text(json.dumps(rows))
    shutil.rmtree(checkpoint, ignore_errors=True)
    partial.rename(checkpoint)


def _export(recipe: Recipe, folder: Path, source: Path, corpus: str) -> ExportConfig:
    places = {"checkpoint": folder / "checkpoint", "source": source, "destination": folder / "model"}
    config = export_config(recipe, corpus=corpus, **{name: str(place) for name, place in places.items()})
    return config.model_copy(update={"sequences_per_domain": SCORED_SEQUENCES})


def _scored(model: Path, corpus: str) -> dict[str, Any]:
    losses = _losses(model, corpus)
    return {
        "parameters": count_parameters(read_config(model)),
        "losses": losses,
        "mean_loss": sum(losses.values()) / len(losses),
    }


def _losses(model: Path, corpus: str) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences = held_out_sequences(open_store(corpus), SCORED_SEQUENCES)
    return mean_losses(domain_loss_sums(load_model(model).to(device), sequences, 8, device))
