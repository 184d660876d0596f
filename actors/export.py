"""Choosing, extraction and export as Ray tasks, where the memory and the device are."""

from typing import Any

import ray

from actors.tasks import task_result
from shearing.training.choosing import ChoosingConfig, choose_and_write
from shearing.training.export import ExportConfig, export_model
from shearing.training.shrinking import extract_model


def export_on_cluster(config: ExportConfig, cpus: float, gpus: float) -> dict[str, Any]:
    """`shearing.training.export.export_model` in a Ray task; it needs no GPU but is placed like a worker."""
    return _run(export_model, config, cpus, gpus)


def extract_on_cluster(config: ExportConfig, cpus: float, gpus: float) -> dict[str, Any]:
    """`shearing.training.shrinking.extract_model` in a Ray task."""
    return _run(extract_model, config, cpus, gpus)


def choose_on_cluster(config: ChoosingConfig, cpus: float, gpus: float) -> dict[str, Any]:
    """`shearing.training.choosing.choose_and_write` in a Ray task."""
    return _run(choose_and_write, config, cpus, gpus)


def _run(function: Any, config: ExportConfig | ChoosingConfig, cpus: float, gpus: float) -> dict[str, Any]:
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=2)(function)
    outputs: dict[str, Any] = task_result(task.remote(config))
    return outputs
