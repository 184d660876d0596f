import pytest
import torch
from tiny_eval_corpus import write_tiny_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from actors.held_out_losses import held_out_losses, measure_losses
from shearing.evaluation.scoring import ScoreProtocol
from shearing.evaluation.throughput import Load
from shearing.storage import open_store


@pytest.fixture
def measured(tmp_path):
    """A random model, a protocol over a tiny corpus, and the losses by Hugging Face's own loss."""
    store = open_store(str(tmp_path / "corpus"))
    tokens = write_tiny_corpus(store, {"wiki": [3, 4], "code": [5]})
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    expected, read = {}, {"wiki": [0, 1, 3, 4], "code": [0, 1, 2, 3]}  # the first ones of each shard
    with torch.no_grad():
        for domain, tokens_NT in tokens.items():
            rows = [torch.from_numpy(row.astype("int64"))[None] for row in tokens_NT[read[domain]]]
            expected[domain] = sum(float(model(input_ids=row, labels=row).loss) for row in rows) / len(rows)
    protocol = ScoreProtocol(store.uri, sequences_per_domain=4, batch_sequences=3, load=Load(4, 2))
    return str(tmp_path / "model"), protocol, expected


def test_losses_are_hugging_faces_own(measured):
    """Reference losses measured otherwise than the training's evaluation shift every excess loss."""
    model, protocol, expected = measured
    assert held_out_losses(model, protocol) == pytest.approx(expected, abs=1e-5)


def test_a_ray_task_gives_the_same(ray_session, measured):
    model, protocol, expected = measured
    assert measure_losses(model, protocol, cpus=0.5) == pytest.approx(expected, abs=1e-5)
