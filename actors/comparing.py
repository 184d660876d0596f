"""Losses of several models on the same sequences, a Ray task each."""

from typing import Any

import ray

from actors.tasks import task_result
from shearing.evaluation.comparing import measure
from shearing.evaluation.config import TextConfig
from shearing.evaluation.scoring import ScoreProtocol


def measure_models(
    models: dict[str, str], protocol: ScoreProtocol, text: TextConfig | None, cpus: float = 1, gpus: float = 0
) -> dict[str, dict[str, Any]]:
    """`shearing.evaluation.comparing.measure` of every model.

    Args:
        models: name -> Hugging Face directory that every node can read.
        protocol: How losses are measured.
        text: Measured on as well.
        cpus: CPUs of one task.
        gpus: GPUs of one task.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(measure)
    running = {name: task.remote(model_dir, protocol, text) for name, model_dir in models.items()}
    return {name: task_result(reference) for name, reference in running.items()}
