import inspect

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.evaluation import throughput
from shearing.evaluation.throughput import (
    Load,
    answer,
    disk_bytes,
    measure_speeds,
    parameter_count,
    peak_memory_bytes,
    prunable_parameter_count,
)


def llama(hidden=16, layers=2, tied=False, **kwargs):
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            **kwargs,
        )
    )


def test_parameters_are_counted_once():
    """A tied head counted twice; embeddings or norms counted as prunable."""
    # q 16x16, k and v 16x8, o 16x16, three MLP matrices 16x24, by hand
    matrices = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    norms = 2 * 2 * 16 + 16
    for tied in (False, True):
        model = llama(tied=tied)
        assert prunable_parameter_count(model) == matrices
        assert parameter_count(model) == matrices + norms + 50 * 16 * (1 if tied else 2)


def test_disk_bytes_counts_every_file(tmp_path):
    """Only the top folder, or only the weights, counted."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub/b").write_bytes(b"123")
    assert disk_bytes(tmp_path) == 8


class Timed(torch.nn.Module):
    """Takes 20 ms for a prompt and 5 ms for each further token, and notes what it was asked."""

    def __init__(self, name, log, clock, factor=1.0):
        super().__init__()
        self.clock = clock
        self.config = LlamaConfig(vocab_size=10)
        self.name, self.log, self.factor = name, log, factor

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        self.log.append((self.name, tuple(input_ids.shape), past_key_values, logits_to_keep))
        self.clock[0] += self.factor * (0.005 if past_key_values else 0.020)
        seen = (past_key_values or 0) + input_ids.shape[1]
        return type("Output", (), {"logits": torch.zeros(len(input_ids), 1, 10), "past_key_values": seen})


def test_rates_count_all_tokens_of_the_batch_and_models_take_turns(monkeypatch):
    """Tokens of one sequence instead of the batch, a cache not passed on, one model measured after the other."""
    log, clock = [], [0.0]
    monkeypatch.setattr(throughput, "_now", lambda _device: clock[0])
    models = {"source": Timed("source", log, clock), "result": Timed("result", log, clock, factor=0.5)}
    speeds = measure_speeds(models, Load(prompt_tokens=32, decode_tokens=4, batch_sequences=2), "cpu", repeats=3)
    assert speeds["source"].prefill_tokens_per_s.median == pytest.approx(2 * 32 / 0.020)
    assert speeds["source"].decode_tokens_per_s.median == pytest.approx(2 * 4 / 0.020)
    assert speeds["result"].decode_tokens_per_s.median == pytest.approx(2 * 4 / 0.010)
    assert log[:5] == [("result", (2, 32), None, 1)] + [("result", (2, 1), 32 + i, 0) for i in range(4)]
    order = [name for name, shape, past, _ in log if past is None]
    assert order == ["result", "source", "source", "result", "result", "source", "source", "result"]


def test_cached_decoding_sees_the_whole_prompt():
    """A cache dropped or an attention mask of one token: the continuation would not follow from the prompt."""
    model = llama(initializer_range=0.5)
    seen = []
    original = model.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["input_ids"])
        return original(*args, **kwargs)

    spy.__signature__ = inspect.signature(original)
    model.forward = spy
    answer(model, Load(prompt_tokens=12, decode_tokens=6), "cpu")
    model.forward = original
    with torch.no_grad():
        expected = model.generate(seen[0], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.cat(seen[1:], 1).tolist() == expected[:, 12:].tolist()


def test_peak_memory_follows_the_weights():
    """A baseline taken after loading, freed pages of an earlier model hiding the growth, bytes for kibibytes."""
    load = Load(prompt_tokens=8, decode_tokens=2)

    def build(hidden):
        return lambda: llama(hidden=hidden, layers=4)

    peak_memory_bytes(build(256), load, "cpu")  # libraries and thread pools
    small = peak_memory_bytes(build(512), load, "cpu")
    large = peak_memory_bytes(build(8192), load, "cpu")
    weights = sum(p.numel() * p.element_size() for p in build(8192)().parameters())
    assert weights > 12e6
    assert weights * 0.9 < large < weights * 1.5 + 10e6
    assert small < large / 2
