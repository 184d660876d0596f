"""What is measured of one model to compare it, against the readers that score it elsewhere."""

import pytest
import torch
from tiny_eval_corpus import write_tiny_corpus
from tiny_tokenizer import VOCABULARY, write_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.evaluation.comparing import measure
from shearing.evaluation.config import TextConfig
from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.evaluation.scoring import ScoreProtocol
from shearing.evaluation.text_perplexity import score_text
from shearing.evaluation.throughput import Load
from shearing.models.loading import load_model
from shearing.storage import open_store


@pytest.fixture
def protocol(tmp_path):
    store = open_store(str(tmp_path / "corpus"))
    write_tiny_corpus(store, {"wiki": [3, 4], "code": [5]}, vocabulary=VOCABULARY)
    return ScoreProtocol(corpus_uri=store.uri, sequences_per_domain=6, batch_sequences=4, load=Load(4, 2))


@pytest.fixture
def model_dir(tmp_path):
    """A model with half of one matrix zero."""
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.3, **shape))
    model.model.layers[0].mlp.up_proj.weight.data[::2] = 0
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


def test_losses_zeros_and_text_are_those_of_the_scores(protocol, model_dir, tmp_path):
    """Other sequences than the scores', zeros that count as parameters, a text read by another protocol."""
    (tmp_path / "text.txt").write_text("Some words to be read in windows. " * 4)
    text = TextConfig(file=str(tmp_path / "text.txt"), window_tokens=16)
    found = measure(model_dir, protocol, text)
    model, sequences = load_model(model_dir), {d: len(v) for d, v in found["sequence_losses"].items()}
    assert sequences == {"wiki": 6, "code": 5}
    rows = held_out_sequences(open_store(protocol.corpus_uri), 6)
    assert found["losses"] == pytest.approx(mean_losses(domain_loss_sums(model, rows, 2, "cpu")), abs=1e-5)
    assert found["parameters"] - found["nonzero_parameters"] == 12 * 16
    assert found["text"] == score_text(model_dir, text, protocol)
    assert "text" not in measure(model_dir, protocol, None)
