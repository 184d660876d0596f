"""The scores of a Hugging Face directory: loss and perplexity per domain, parameters, memory, disk, speed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from shearing.data.manifest import load_manifest
from shearing.errors import UserError
from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.inference import Inference
from shearing.evaluation.losses import domain_loss_sums, mean_losses, perplexity
from shearing.evaluation.throughput import (
    Load,
    Rate,
    disk_bytes,
    measure_speeds,
    parameter_count,
    peak_memory_bytes,
    prunable_parameter_count,
)
from shearing.models.directories import local_directory
from shearing.storage import open_store


@dataclass(frozen=True)
class ScoreProtocol(Inference):
    """How models are scored; the same for all that are compared.

    Args:
        corpus_uri: The prepared corpus.
        sequences_per_domain: Held-out sequences of each domain.
        load: What speed and memory are measured with.
        repeats: Rounds of the speed measurement.
    """

    corpus_uri: str
    sequences_per_domain: int
    load: Load
    repeats: int = 5

    def describe(self) -> dict[str, Any]:
        """The protocol in words and numbers, for whoever reads the scores. Reads the corpus' manifest."""
        manifest = load_manifest(open_store(self.corpus_uri))
        sequences = {
            domain: min(self.sequences_per_domain, splits["eval"].sequences)
            for domain, splits in manifest.domains.items()
        }
        numbers = {key: value for key, value in asdict(self).items() if key not in ("load", "trust_remote_code")}
        return {
            **numbers,
            **asdict(self.load),
            "load_batch_sequences": self.load.batch_sequences,
            "batch_sequences": self.batch_sequences,
            "split": "eval",
            "sequence_tokens": manifest.sequence_tokens,
            "predicted_tokens": {d: n * (manifest.sequence_tokens - 1) for d, n in sequences.items()},
            "windows": "whole stored sequences, side by side without overlap; documents are packed with the boundary "
            "token between them and may begin or end inside a window",
            "bos_rule": "no token is put before a window; its first token is read and not predicted",
            "perplexity": "exp(mean next-token loss in nats) over all predicted tokens of the domain",
            "mean_loss": "plain mean over domains, each counting the same",
        }


def score(model_dir: str, protocol: ScoreProtocol) -> dict[str, Any]:
    """Scores of one model, speed apart. Call it in a fresh process: memory is measured as this process's growth.

    Raises:
        UserError: The model's vocabulary is smaller than the corpus' tokenizer, its positions too few,
            or a domain holds nothing to measure on.
    """
    torch.set_num_threads(protocol.threads)
    corpus = open_store(protocol.corpus_uri)
    model: Any = load_model(model_dir, protocol)
    check_vocabulary(model_dir, int(model.config.vocab_size), load_manifest(corpus).tokenizer.vocab_size)
    sequences = held_out_sequences(corpus, protocol.sequences_per_domain)
    losses = mean_losses(domain_loss_sums(model, sequences, protocol.batch_sequences, protocol.device))
    scores: dict[str, Any] = {
        "parameters": parameter_count(model),
        "prunable_parameters": prunable_parameter_count(model),
        "disk_bytes": disk_bytes(local_directory(model_dir)),
        "losses": losses,
        "mean_loss": sum(losses.values()) / len(losses),
        "perplexity": {domain: perplexity(loss) for domain, loss in losses.items()},
    }
    # once through the load, so that what it makes the process load for good is not taken for the model's
    measure_speeds({"model": model}, protocol.load, protocol.device, repeats=1)
    del model
    peak = peak_memory_bytes(lambda: load_model(model_dir, protocol), protocol.load, protocol.device)
    return {**scores, "peak_memory_bytes": peak}


def compare_speeds(model_dirs: dict[str, str], protocol: ScoreProtocol) -> dict[str, dict[str, Any]]:
    """Prefill and decode tokens a second of several models, measured in turns in one process."""
    torch.set_num_threads(protocol.threads)
    models = {name: load_model(model_dir, protocol) for name, model_dir in model_dirs.items()}
    speeds = measure_speeds(models, protocol.load, protocol.device, protocol.repeats)
    return {
        name: {
            "prefill_tokens_per_s": speed.prefill_tokens_per_s.median,
            "prefill_quartiles": _quartiles(speed.prefill_tokens_per_s),
            "decode_tokens_per_s": speed.decode_tokens_per_s.median,
            "decode_quartiles": _quartiles(speed.decode_tokens_per_s),
        }
        for name, speed in speeds.items()
    }


def load_model(model_dir: str, protocol: ScoreProtocol) -> nn.Module:
    """The model of a Hugging Face directory (path or URI), ready to answer.

    Raises UserError where it has fewer positions than the load needs.
    """
    model: Any = protocol.load_model(model_dir)
    positions = getattr(model.config, "max_position_embeddings", None)
    needed = protocol.load.prompt_tokens + protocol.load.decode_tokens
    if positions is not None and needed > positions:
        raise UserError(
            f"scores.prompt_tokens = {protocol.load.prompt_tokens} and scores.decode_tokens = "
            f"{protocol.load.decode_tokens} need {needed} positions; {model_dir} has {positions}. Lower one of them."
        )
    return model


def check_vocabulary(model_dir: str, model_vocabulary: int, tokenizer_vocabulary: int) -> None:
    """Raise UserError where the corpus holds token ids that the model does not know."""
    if model_vocabulary < tokenizer_vocabulary:
        raise UserError(
            f"{model_dir} knows {model_vocabulary:,} tokens, the corpus was made with a tokenizer of "
            f"{tokenizer_vocabulary:,}; name the recipe whose corpus was made with this model's tokenizer"
        )


def _quartiles(rate: Rate) -> list[float]:
    return [rate.lower_quartile, rate.upper_quartile]
