"""Perplexity on a text, against one forward pass a token with plain transformers."""

import hashlib
import math

import pytest
import torch
from tiny_tokenizer import VOCABULARY, write_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.errors import UserError
from shearing.evaluation.config import TextConfig
from shearing.evaluation.inference import Inference
from shearing.evaluation.text_perplexity import Windows, plan_windows, score_text, window_losses

TEXT = "A window, a stride and a rule: without them no perplexity says anything.\n"  # 73 bytes, so 73 tokens
INFERENCE = Inference(batch_sequences=2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def one_by_one(model, ids, window, stride, bos):
    """Losses of the tokens that have anything before them in the first window that holds them."""
    losses, holds = [], window - (bos is not None)
    for place, token in enumerate(ids):
        begin = 0
        while begin + holds <= place:
            begin += stride
        before = ([] if bos is None else [bos]) + ids[begin:place]
        if before:
            with torch.no_grad():
                log_V = model(torch.tensor([before])).logits[0, -1].log_softmax(-1)
            losses.append(-float(log_V[token]))
    return losses


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 15), (16, 5), (24, 1), (40, None), (17, 16)])
def test_perplexity_is_that_of_tokens_taken_one_by_one(model_dir, text_file, window, stride, bos):
    """Tokens scored twice or never, contexts cut short, a token predicted from itself, a short last window lost."""
    config = TextConfig(file=text_file, window_tokens=window, stride_tokens=stride, bos=bos)
    found = score_text(model_dir, config, INFERENCE)
    model, tokenizer = LlamaForCausalLM.from_pretrained(model_dir), INFERENCE.load_tokenizer(model_dir)
    ids = tokenizer(TEXT)["input_ids"]
    losses = one_by_one(model, ids, window, stride or window - bos, tokenizer.bos_token_id if bos else None)
    assert found["protocol"]["predicted_tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_the_protocol_is_stated(model_dir, text_file):
    """A perplexity that nobody can compare with another."""
    protocol = score_text(model_dir, TextConfig(file=text_file, window_tokens=16, bos=True), INFERENCE)["protocol"]
    assert protocol["text_tokens"] == protocol["predicted_tokens"] == len(TEXT)
    assert (protocol["window_tokens"], protocol["stride_tokens"], protocol["windows"]) == (16, 15, 5)
    assert protocol["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert "16 positions, side by side" in protocol["window_rule"]
    assert "opens each window" in protocol["bos_rule"]
    apart = score_text(model_dir, TextConfig(file=text_file), INFERENCE)["protocol"]
    assert (apart["window_tokens"], apart["stride_tokens"]) == (40, 40), "all positions that the model has"
    assert "the first token of each is read and not predicted" in apart["bos_rule"]
    overlap = score_text(model_dir, TextConfig(file=text_file, stride_tokens=8), INFERENCE)["protocol"]
    assert "each beginning 8 tokens after the one before" in overlap["window_rule"]
    assert "the text's first token is read and not predicted" in overlap["bos_rule"]


def test_batches_make_no_difference(model_dir):
    """A window's tokens counted with its neighbour's beginning."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    ids_T = torch.arange(77) * 31 % VOCABULARY
    found = [window_losses(model, ids_T, Windows(12, 7, 0), batch) for batch in (1, 3, 100)]
    assert [count for _, count in found] == [77, 77, 77]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-6)


def test_all_that_cannot_be_is_refused_at_once(model_dir, tmp_path):
    """A window beyond the positions, or a stride that leaves tokens out, found after the model has been loaded."""
    config = TextConfig(file=str(tmp_path / "nowhere.txt"), window_tokens=41, stride_tokens=42)
    with pytest.raises(UserError) as error:
        plan_windows(config, model_dir, INFERENCE)
    window, stride, file = error.value.problems
    assert "window = 41 tokens" in window
    assert "Give 40 at most" in window
    assert "Give 1 to 41" in stride
    assert "nowhere.txt is no file" in file


def test_a_text_without_anything_to_predict_is_refused(model_dir, tmp_path):
    (tmp_path / "one.txt").write_text("A")
    (tmp_path / "latin.txt").write_bytes("sch\u00f6n".encode("latin-1"))
    with pytest.raises(UserError, match="too few to predict one"):
        score_text(model_dir, TextConfig(file=str(tmp_path / "one.txt")), INFERENCE)
    with pytest.raises(UserError, match="is not UTF-8 text"):
        score_text(model_dir, TextConfig(file=str(tmp_path / "latin.txt")), INFERENCE)


def test_no_begin_of_text_token_is_said(model_dir, text_file, tmp_path):
    """A window that is opened by nothing while the output says that it is."""
    tokenizer = write_byte_tokenizer(tmp_path)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="names no begin-of-text token"):
        plan_windows(TextConfig(file=text_file, bos=True), str(tmp_path), INFERENCE)
