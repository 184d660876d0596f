import math
from pathlib import Path

import pytest
import torch
from tiny_eval_corpus import write_tiny_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.errors import UserError
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.evaluation.scoring import ScoreProtocol, check_vocabulary, load_model
from shearing.evaluation.throughput import Load, parameter_count
from shearing.storage import open_store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("corpus")))
    return store, write_tiny_corpus(store, {"wiki": [3, 4], "code": [5]})


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, hidden in (("source", 32), ("result", 16)):
        torch.manual_seed(hidden)
        shape = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=40, num_key_value_heads=2, initializer_range=0.3, **shape)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("source", "result")}


def protocol(corpus, **changes):
    settings = {"sequences_per_domain": 6, "batch_sequences": 2, "load": Load(12, 4), "repeats": 2} | changes
    return ScoreProtocol(corpus_uri=corpus.uri, **settings)


def test_scores_of_two_models(ray_session, corpus, model_dirs):
    """Scores under the wrong model's name, losses on other rows than stated, a key of the stage's output missing."""
    from actors.scoring import score_models

    store, sequences = corpus
    found = score_models(model_dirs, protocol(store), compared=("source", "result"), cpus=1)
    for name, model_dir in model_dirs.items():
        scores = found["models"][name]
        model = LlamaForCausalLM.from_pretrained(model_dir)
        expected = mean_losses(domain_loss_sums(model, {d: rows[:6] for d, rows in sequences.items()}, 1, "cpu"))
        assert scores["losses"] == pytest.approx(expected, abs=1e-5)
        assert scores["mean_loss"] == pytest.approx((expected["wiki"] + expected["code"]) / 2, abs=1e-5)
        assert scores["perplexity"]["wiki"] == pytest.approx(math.exp(expected["wiki"]), rel=1e-4)
        assert scores["parameters"] == parameter_count(model)
        assert scores["disk_bytes"] == sum(path.stat().st_size for path in Path(model_dir).iterdir())
        assert scores["peak_memory_bytes"] > 0
        low, high = scores["decode_quartiles"]
        assert 0 < low <= scores["decode_tokens_per_s"] <= high
        assert scores["prefill_tokens_per_s"] > 0
    assert found["protocol"]["predicted_tokens"] == {"wiki": 6 * 15, "code": 5 * 15}
    assert "without overlap" in found["protocol"]["windows"]


def test_an_error_of_the_users_arrives_as_itself(ray_session, corpus, model_dirs):
    """A Ray traceback where one sentence would do."""
    from actors.scoring import score_models

    request = protocol(corpus[0], load=Load(2040, 40))
    with pytest.raises(UserError, match=r"scores\.prompt_tokens = 2040 and scores\.decode_tokens = 40 need 2080"):
        score_models({"source": model_dirs["source"]}, request, compared=(), cpus=1)


def test_a_vocabulary_too_small_is_refused(model_dirs, corpus):
    """An index error deep in the embedding, or losses of the wrong tokens."""
    with pytest.raises(UserError, match="knows 40 tokens, the corpus was made with a tokenizer of 41"):
        check_vocabulary(model_dirs["source"], 40, 41)
    check_vocabulary(model_dirs["source"], 48, 41)  # a padded embedding is fine


def test_weights_are_scored_in_the_dtype_asked_for(corpus, model_dirs):
    """Float32 memory and speed reported for a model that runs in bfloat16."""
    model = load_model(model_dirs["source"], protocol(corpus[0], dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
