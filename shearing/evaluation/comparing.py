"""What is measured of a model to compare it with others: its losses on the same sequences, one by one."""

from typing import Any

import torch

from shearing.data.manifest import load_manifest
from shearing.evaluation.config import TextConfig
from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import perplexity, sequence_losses
from shearing.evaluation.scoring import ScoreProtocol, check_vocabulary
from shearing.evaluation.text_perplexity import score_text
from shearing.evaluation.throughput import parameter_count
from shearing.storage import open_store


def measure(model_dir: str, protocol: ScoreProtocol, text: TextConfig | None) -> dict[str, Any]:
    """Losses of one model sequence by sequence, its parameters that are not zero, and its perplexity on a text.

    Raises:
        UserError: The model's vocabulary is smaller than the corpus' tokenizer, the text cannot be read as asked,
            or a domain holds nothing to measure on.
    """
    torch.set_num_threads(protocol.threads)
    corpus = open_store(protocol.corpus_uri)
    model: Any = protocol.load_model(model_dir)
    check_vocabulary(model_dir, int(model.config.vocab_size), load_manifest(corpus).tokenizer.vocab_size)
    sequences = held_out_sequences(corpus, protocol.sequences_per_domain)
    found = sequence_losses(model, sequences, protocol.batch_sequences, protocol.device)
    losses = {domain: sum(of_domain) / len(of_domain) for domain, of_domain in found.items()}
    measured = {
        "sequence_losses": found,
        "losses": losses,
        "mean_loss": sum(losses.values()) / len(losses),
        "perplexity": {domain: perplexity(loss) for domain, loss in losses.items()},
        "parameters": parameter_count(model),
        "nonzero_parameters": sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters()),
    }
    return measured if text is None else measured | {"text": score_text(model_dir, text, protocol)}
