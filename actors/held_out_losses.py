"""Held-out losses of a Hugging Face directory as one Ray task."""

from typing import Any

import ray

from actors.tasks import task_result
from shearing.data.manifest import load_manifest
from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.evaluation.scoring import ScoreProtocol, check_vocabulary, load_model
from shearing.storage import open_store


def measure_losses(model_dir: str, protocol: ScoreProtocol, cpus: float = 1, gpus: float = 0) -> dict[str, float]:
    """Nats a token per domain of a model, on the corpus' eval split, in a Ray task.

    Args:
        model_dir: Hugging Face directory that every node can read.
        protocol: How losses are measured; its load and repeats do not matter here.
        cpus: CPUs of the task.
        gpus: GPUs of the task.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=2)(held_out_losses)
    losses: dict[str, float] = task_result(task.remote(model_dir, protocol))
    return losses


def held_out_losses(model_dir: str, protocol: ScoreProtocol) -> dict[str, float]:
    """Nats a token per domain, in this process. Raises UserError where a domain holds nothing to measure on."""
    import torch

    torch.set_num_threads(protocol.threads)
    corpus = open_store(protocol.corpus_uri)
    model: Any = load_model(model_dir, protocol)
    check_vocabulary(model_dir, int(model.config.vocab_size), load_manifest(corpus).tokenizer.vocab_size)
    sequences = held_out_sequences(corpus, protocol.sequences_per_domain)
    return mean_losses(domain_loss_sums(model, sequences, protocol.batch_sequences, protocol.device))
