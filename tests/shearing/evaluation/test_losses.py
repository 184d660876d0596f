import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shearing.evaluation import losses
from shearing.evaluation.losses import domain_loss_sums, mean_losses, sequence_losses

GOLDEN = Path(__file__).parents[3] / "../shared/golden"
VOCABULARY = 53


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    torch.set_num_threads(2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    )


@pytest.fixture(scope="module")
def sequences():
    draw = np.random.default_rng(2)
    return {
        "wiki": draw.integers(VOCABULARY, size=(5, 12), dtype=np.uint16),
        "code": draw.integers(VOCABULARY, size=(3, 12), dtype=np.int32),
        "law": draw.integers(VOCABULARY, size=(1, 9), dtype=np.int64),
    }


def hf_loss(model, tokens_NT):
    ids = torch.from_numpy(tokens_NT.astype(np.int64))
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def test_equals_hugging_faces_own_loss(model, sequences):
    """Off-by-one in the shift, a wrong token count, a mean of means over ragged batches."""
    sums = domain_loss_sums(model, sequences, batch_sequences=2, device="cpu")
    assert {domain: tokens for domain, (_, tokens) in sums.items()} == {"wiki": 55, "code": 33, "law": 8}
    for domain, loss in mean_losses(sums).items():
        assert loss == pytest.approx(hf_loss(model, sequences[domain]), abs=1e-5)


@pytest.mark.parametrize("batch_sequences", [1, 2, 5])
def test_each_sequence_has_its_own_loss(model, sequences, batch_sequences):
    """Sequences out of order, a loss of a batch given to each of its sequences."""
    found = sequence_losses(model, sequences, batch_sequences, "cpu")
    for domain, tokens_NT in sequences.items():
        alone = [hf_loss(model, tokens_NT[n : n + 1]) for n in range(len(tokens_NT))]
        assert found[domain] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("world", [2, 3, 4, 11])
def test_ranks_add_up_and_make_equally_many_forwards(model, sequences, world):
    """A padded repeat that counts, a batch given to no rank, a rank that would leave ZeRO-3's others waiting."""
    whole = domain_loss_sums(model, sequences, 2, "cpu")
    parts, forwards = [], []
    for rank in range(world):
        calls = []

        def forward(ids_NT, calls=calls):
            calls.append(ids_NT.shape)
            return model(input_ids=ids_NT).logits

        parts.append(domain_loss_sums(model, sequences, 2, "cpu", rank=rank, world=world, forward=forward))
        forwards.append(len(calls))
    assert set(forwards) == {math.ceil(6 / world)}
    for domain, (total, tokens) in whole.items():
        assert sum(part[domain][1] for part in parts) == tokens
        assert sum(part[domain][0] for part in parts) == pytest.approx(total, abs=1e-9)


def test_reading_logits_in_pieces_changes_nothing(model, sequences, monkeypatch):
    """A token lost or doubled where one sequence's logits are cut."""
    whole = domain_loss_sums(model, sequences, 4, "cpu")
    monkeypatch.setattr(losses, "FLOAT32_LOGITS_AT_ONCE", 5 * VOCABULARY)
    pieces = domain_loss_sums(model, sequences, 4, "cpu")
    for domain, (total, tokens) in whole.items():
        assert pieces[domain][1] == tokens
        assert pieces[domain][0] == pytest.approx(total, abs=1e-6)


def test_modes_are_restored_and_dropout_is_off(model, sequences):
    """Training that goes on without dropout after an evaluation, or a frozen part thawed by it."""
    noisy = copy.deepcopy(model).train()
    noisy.config.attention_dropout = 0.5
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    noisy.model.layers[0].eval()
    modes = {name: module.training for name, module in noisy.named_modules()}
    quiet = domain_loss_sums(noisy, sequences, 2, "cpu")
    assert quiet == domain_loss_sums(noisy, sequences, 2, "cpu")
    assert {name: module.training for name, module in noisy.named_modules()} == modes
    assert modes["model.layers.1"]
    assert not modes["model.layers.0"]
    assert all(parameter.grad is None for parameter in noisy.parameters())


def test_modes_are_restored_after_an_error(model, sequences):
    """A failed evaluation that leaves the model in evaluation mode."""
    model.train()

    def broken(ids_NT):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        domain_loss_sums(model, sequences, 2, "cpu", forward=broken)
    assert model.training


def test_bfloat16_logits_are_summed_exactly(sequences):
    """Sums in bfloat16 or float32, which stop growing on long evaluations."""
    constant = np.zeros((4, 4097), np.int64)

    def forward(ids_NT):
        logits = torch.zeros(*ids_NT.shape, 2, dtype=torch.bfloat16)
        logits[..., 1] = 1.0
        return logits

    (total, tokens) = domain_loss_sums(torch.nn.Identity(), {"d": constant}, 2, "cpu", forward=forward)["d"]
    assert tokens == 4 * 4096
    assert total / tokens == pytest.approx(math.log1p(math.e), abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_refuses_what_predicts_nothing(model, shape):
    """A silent 0/0 for an empty domain."""
    with pytest.raises(ValueError, match="wiki"):
        domain_loss_sums(model, {"wiki": np.zeros(shape, np.int64)}, 2, "cpu")
    with pytest.raises(ValueError, match="no token was evaluated in code"):
        mean_losses({"wiki": (1.0, 1), "code": (0.0, 0)})


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden files here")
def test_equals_the_published_perplexity():
    """Any drift of the protocol from the published evaluation: windows, shift, averaging."""
    dense = json.loads((GOLDEN / "slicegpt/fusion_rotation_llama_gqa.json").read_text())["dense"]["plain_ppl"]
    tokens_NT = np.load(GOLDEN / "slicegpt/tokens.npz")["eval"]
    golden = AutoModelForCausalLM.from_pretrained(GOLDEN / "models/llama_gqa", dtype=torch.float32)
    loss = mean_losses(domain_loss_sums(golden, {"text": tokens_NT}, 8, "cpu"))["text"]
    assert math.exp(loss) == pytest.approx(dense, rel=1e-5)
