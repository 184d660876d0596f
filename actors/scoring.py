"""Scoring as Ray tasks, each in a process of its own, so that memory is measured from nothing."""

import uuid
from typing import Any

import ray

from actors.tasks import task_result
from shearing.evaluation import harness, text_perplexity
from shearing.evaluation.config import TasksConfig, TextConfig
from shearing.evaluation.inference import Inference
from shearing.evaluation.scoring import ScoreProtocol, compare_speeds, score


def score_models(
    model_dirs: dict[str, str], protocol: ScoreProtocol, compared: tuple[str, ...], cpus: float = 1, gpus: float = 0
) -> dict[str, Any]:
    """Scores of all models, and the speeds of those compared, measured in turns once nothing else runs.

    Args:
        model_dirs: name -> Hugging Face directory that every node can read.
        protocol: How they are scored.
        compared: Names whose speed is measured; the others have no speed entries.
        cpus: CPUs of one task.
        gpus: GPUs of one task.

    Returns:
        `models`: name -> scores; `protocol`: what was done, in words and numbers.
    """
    running = {name: _task(score, cpus, gpus).remote(model_dir, protocol) for name, model_dir in model_dirs.items()}
    models = {name: task_result(reference) for name, reference in running.items()}
    if compared:
        chosen = {name: model_dirs[name] for name in compared}
        for name, speeds in task_result(_task(compare_speeds, cpus, gpus).remote(chosen, protocol)).items():
            models[name] |= speeds
    return {"models": models, "protocol": protocol.describe()}


def score_tasks(
    model_dir: str, config: TasksConfig, inference: Inference, *, offline: bool, cpus: float = 1, gpus: float = 0
) -> dict[str, Any]:
    """What `harness.score_tasks` finds; `offline`: data sets may come from local files and caches alone."""
    task = _task(harness.score_tasks, cpus, gpus, HF_HUB_OFFLINE=str(int(offline)))
    return task_result(task.remote(model_dir, config, inference))


def score_text(
    model_dir: str, config: TextConfig, inference: Inference, cpus: float = 1, gpus: float = 0
) -> dict[str, Any]:
    """What `text_perplexity.score_text` finds."""
    return task_result(_task(text_perplexity.score_text, cpus, gpus).remote(model_dir, config, inference))


def _task(function: Any, cpus: float, gpus: float, **more: str) -> Any:
    environment = {
        "SHEAR_FRESH_PROCESS": uuid.uuid4().hex,  # no worker was ever started with it, so a new one is
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    } | more
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=2, runtime_env={"env_vars": environment})(
        function
    )
