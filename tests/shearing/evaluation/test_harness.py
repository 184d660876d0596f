"""Tasks by the harness, against log-likelihoods worked out here with plain transformers."""

import importlib.metadata
import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import VOCABULARY, write_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.errors import UserError
from shearing.evaluation import harness
from shearing.evaluation.config import TasksConfig
from shearing.evaluation.harness import INSTALL, check_tasks, score_tasks
from shearing.evaluation.inference import Inference
from shearing.models.loading import load_model, model_tensors, new_model, write_model_directory

INFERENCE = Inference(batch_sequences=3)
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl, train: data/examples.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    (folder / "colours.yaml").write_text(TASK)
    questions = [
        {"question": f"Thing {n} is as {n * n} as", "choices": ["red", "blue", "grey"], "answer": n % 3}
        for n in range(20)
    ]
    for name, rows in (("questions", questions[:14]), ("examples", questions[14:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, questions[:14]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def uneven_dir(tmp_path_factory):
    """A model that no stock class loads: one layer without MLP and with half the heads."""
    folder = tmp_path_factory.mktemp("uneven")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "head_dim": 16, "initializer_range": 0.3, **shape}
    halves = {"attention": ["self_attn", "input_layernorm"], "mlp": ["mlp", "post_attention_layernorm"]}
    layers = [{"num_attention_heads": 1, "num_key_value_heads": 1, "skip": ["mlp"]}, {"skip": []}]
    config |= {"architectures": ["UnevenLlamaForCausalLM"], "max_position_embeddings": 128}
    config |= {"uneven": {"path": "model.layers", "modules": halves, "layers": layers}}
    write_model_directory(folder / "model", config, model_tensors(new_model(config, seed=4)))
    write_byte_tokenizer(folder / "model")
    return str(folder / "model")


def log_likelihood(model, tokenizer, question, choice):
    context, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (question, f"{question} {choice}"))
    with torch.no_grad():
        log_TV = model(whole).logits[0].log_softmax(-1)
    return sum(float(log_TV[t - 1, whole[0, t]]) for t in range(context.shape[1], whole.shape[1]))


@pytest.mark.parametrize("kind", ["model_dir", "uneven_dir"])
def test_accuracy_is_that_of_log_likelihoods(task_files, kind, request):
    """Another model than the one named, questions left out or doubled, continuations scored at the wrong tokens."""
    (folder, questions), model_dir = task_files, request.getfixturevalue(kind)
    found = score_tasks(model_dir, TasksConfig(names=["colours"], files=str(folder)), INFERENCE)
    model = load_model(model_dir)
    tokenizer = INFERENCE.load_tokenizer(model_dir)
    right = []
    for row in questions:
        scores = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        right.append(float(scores.index(max(scores)) == row["answer"]))
    mean = sum(right) / len(right)
    assert 0 < mean < 1, "a model that is always right or wrong tests nothing"
    metric = found["tasks"]["colours"]["metrics"]["acc"]
    assert metric["value"] == pytest.approx(mean)
    assert metric["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1)))
    assert metric["higher_is_better"]


def test_what_was_done_is_recorded(task_files, model_dir):
    """Figures of three questions read as figures of a task; examples asked for and not given."""
    config = TasksConfig(names=["colours"], files=str(task_files[0]), fewshot=2, limit=5)
    found = score_tasks(model_dir, config, INFERENCE)
    entry, protocol = found["tasks"]["colours"], found["protocol"]
    assert (entry["version"], entry["fewshot"], entry["questions"]) == (3.0, 2, 5)
    assert protocol["harness"] == f"lm-eval {importlib.metadata.version('lm-eval')}"
    assert (protocol["limit"], protocol["fewshot"], protocol["most_tokens"]) == (5, 2, 128)
    assert protocol["opening_token_ids"] == []
    json.dumps(found)


def test_a_task_nobody_knows_is_named_with_its_neighbours(task_files):
    """A typing mistake that shows after a model has been loaded on a cluster; one mistake a try."""
    with pytest.raises(UserError) as error:
        check_tasks(TasksConfig(names=["piqua", "arc_easy", "colors", "piqua"], files=str(task_files[0])))
    assert len(error.value.problems) == 2
    assert "did you mean piqa," in error.value.problems[0]
    assert "did you mean colours," in error.value.problems[1]
    with pytest.raises(UserError, match="nowhere is no folder"):
        check_tasks(TasksConfig(names=["colours"], files="nowhere"))


def test_data_that_is_not_there_is_said(tmp_path, model_dir):
    """A stack of a hundred lines out of a library for data sets."""
    (tmp_path / "colours.yaml").write_text(TASK)
    with pytest.raises(UserError, match=r"the data of colours cannot be loaded .*questions"):
        score_tasks(model_dir, TasksConfig(names=["colours"], files=str(tmp_path)), INFERENCE)


def test_without_the_harness_the_command_is_given(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'lm-eval==") as error:
        check_tasks(TasksConfig(names=["piqa"]))
    assert INSTALL in str(error.value)


def test_the_command_installs_what_is_tested():
    """A release of the harness named to users that nobody has run."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (pinned,) = project["optional-dependencies"]["eval"]
    assert f"pip install '{pinned}'" == INSTALL
    assert pinned in project["optional-dependencies"]["dev"]


def test_a_model_without_tokenizer_is_refused(task_files, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="holds no tokenizer that can be loaded"):
        score_tasks(str(tmp_path), TasksConfig(names=["colours"], files=str(task_files[0])), INFERENCE)
