"""The command that scores one model: what it refuses before Ray starts, and what it prints."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "score_model.py"
RECIPE = """
name: scored
corpus:
  path: corpora
  sequence_tokens: 64
  domains: {{wiki: {{text: wiki.txt, proportion: 0.6}}, code: {{text: code.txt, proportion: 0.4}}}}
source: {{model: model}}
pruning: {{steps: 4, global_batch_tokens: 128, target: {{hidden_size: 64}}}}
recovery: {{steps: 4, global_batch_tokens: 128}}
{more}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def write_corpus(folder: Path, name: str, sequence_tokens: int = 64, vocabulary: int = 500) -> None:
    entry = {"sequences": 3, "tokens": 192, "documents": 1, "text_bytes": 9, "shards": []}
    manifest = {
        "fingerprint": name,
        "sequence_tokens": sequence_tokens,
        "token_dtype": "uint16",
        "tokenizer": {"sha256": "", "vocab_size": vocabulary, "boundary_token_id": 0},
        "domains": {"wiki": {"eval": entry}, "code": {"eval": entry}},
        "sources": [],
        "malformed": [],
        "malformed_lines": 0,
        "lines": 1,
    }
    (folder / "corpora" / name).mkdir(parents=True)
    (folder / "corpora" / name / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(more=""))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return tmp_path


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_all_that_is_missing_is_named_at_once(folder):
    """A corpus prepared by surprise; one problem a try."""
    write_corpus(folder, "other", sequence_tokens=32)
    problems = refused(run(folder, "nowhere", "recipe.yaml"))
    assert "nowhere holds no config.json" in problems
    assert "python pipelines/prepare_corpus.py recipe.yaml" in problems
    assert "sequences of 64 tokens; 1 other corpora lie there" in problems


def test_a_recipe_with_a_mistake_is_refused(folder):
    """Overrides that are not read, or read without checking."""
    assert "scores.promt_tokens" in refused(run(folder, "model", "recipe.yaml", "scores.promt_tokens=8"))
    assert "no recipe" in refused(run(folder, "model", "recip.yaml"))
    assert "cannot open 'gopher://host/model'" in refused(run(folder, "gopher://host/model", "recipe.yaml"))


def test_two_corpora_are_ambiguous(folder):
    """Scores on whichever corpus comes first."""
    write_corpus(folder, "aaaa")
    write_corpus(folder, "bbbb")
    problems = refused(run(folder, "model", "recipe.yaml"))
    assert "corpora/aaaa" in problems
    assert "corpora/bbbb" in problems


def test_the_runs_own_corpus_comes_first(folder):
    """A run's scores repeated on another corpus."""
    write_corpus(folder, "aaaa")
    write_corpus(folder, "bbbb", vocabulary=4000)
    mark = {"stage": "corpus", "inputs": "0", "rests_on": {}, "started": 1.0, "finished": 2.0, "seconds": 1.0}
    mark["outputs"] = {"path": str(folder / "corpora/bbbb"), "fingerprint": "bbbb"}
    (folder / "runs/scored/stages").mkdir(parents=True)
    (folder / "runs/scored/stages/corpus.json").write_text(json.dumps(mark))
    assert "tokenizer of 4,000" in refused(run(folder, "model", "recipe.yaml"))
    # scores on sequences of another length than asked for
    assert "sequences of 32 tokens" in refused(run(folder, "model", "recipe.yaml", "corpus.sequence_tokens=32"))


def test_a_vocabulary_too_small_is_refused(folder):
    """An index error in the embedding, after half a minute."""
    write_corpus(folder, "aaaa")
    assert "knows 400 tokens, the corpus was made with a tokenizer of 500" in refused(
        run(folder, "model", "recipe.yaml")
    )


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("score_model_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_states_its_protocol(script):
    """Perplexities without the windows and the rule of beginning that they hold for."""
    scores = {
        "losses": {"wiki": 2.0, "code": 1.0},
        "perplexity": {"wiki": 7.389, "code": 2.718},
        "mean_loss": 1.5,
        "parameters": 982144,
        "prunable_parameters": 724992,
        "disk_bytes": 4 * 2**20,
        "peak_memory_bytes": 2**30,
        "prefill_tokens_per_s": 12_345.6,
        "prefill_quartiles": [12_000.0, 13_000.0],
        "decode_tokens_per_s": 100.0,
        "decode_quartiles": [90.0, 110.0],
    }
    protocol = {"predicted_tokens": {"wiki": 6300, "code": 63}, "mean_loss": "plain mean", "perplexity": "exp(mean)"}
    protocol |= {"windows": "WINDOWS", "sequence_tokens": 64, "split": "eval", "bos_rule": "BOS", "repeats": 5}
    protocol |= {"load_batch_sequences": 1, "prompt_tokens": 256, "decode_tokens": 64, "dtype": "float32"}
    protocol |= {"device": "cpu", "threads": 1}
    text = script.table({"model": "somewhere", "scores": scores, "protocol": protocol})
    lines = [line.split() for line in text.splitlines()]
    assert ["wiki", "2.000", "7.39", "6,300"] in lines
    assert ["code", "1.000", "2.72", "63"] in lines
    for stated in ("WINDOWS", "BOS", "982,144", "12,346 (12,000 to 13,000)", "1 x 256 prompt tokens"):
        assert stated in text


def test_options_without_what_they_are_about_are_refused(folder):
    """A limit that nothing obeys; a stride for a text that is never read."""
    problems = refused(run(folder, "model", "recipe.yaml", "--limit", "3", "--bos", "no"))
    assert "--limit says something about --tasks" in problems
    assert "--bos says something about --text" in problems
    done = run(folder, "model", "recipe.yaml", "--text", "a.txt", "--window", "1")
    assert (done.returncode, "a whole number from 2 on" in done.stderr) == (2, True)
    done = run(folder, "model", "recipe.yaml", "--tasks", ",")
    assert (done.returncode, "no name is given" in done.stderr) == (2, True)


def test_tasks_and_text_are_checked_before_ray_starts(folder):
    """A cluster started for a misspelt task; no word about the text until the tasks are right."""
    problems = refused(run(folder, "model", "recipe.yaml", "--tasks", "piqua", "--text", "nowhere.txt"))
    assert "the harness knows no task 'piqua'; did you mean piqa" in problems
    assert "model holds no tokenizer" in problems
    assert "nowhere.txt is no file" in problems
    assert "nowhere holds no config.json" in refused(run(folder, "nowhere", "recipe.yaml", "--tasks", "piqa"))


def test_tasks_and_text_show_how_they_were_taken(script):
    """An accuracy without version, examples, questions and standard error is nobody's."""
    metrics = {"acc": {"value": 0.625, "stderr": 0.0612, "higher_is_better": True}}
    metrics |= {"words (strict)": {"value": 3, "stderr": None, "higher_is_better": True}}
    entries = {"piqa": {"version": 1.0, "fewshot": 5, "questions": 64, "metrics": metrics}}
    entries |= {"all": {"version": None, "fewshot": None, "questions": None, "metrics": metrics}}
    protocol = {"harness": "lm-eval 0.0", "limit": 64, "most_tokens": 512, "opening_token_ids": [1], "stderr": "STDERR"}
    protocol |= {"dtype": "float32", "device": "cpu"}
    text = {"loss": 2.0, "perplexity": 7.3891, "protocol": {"file": "wiki.txt", "sha256": "ab12", "windows": 17}}
    text["protocol"] |= {"predicted_tokens": 1200, "text_tokens": 1217, "window_rule": "RULE", "bos_rule": "BOS"}
    text["protocol"] |= {"perplexity": "exp(mean)", "dtype": "float32", "device": "cpu"}
    shown = script.table({"model": "somewhere", "tasks": {"tasks": entries, "protocol": protocol}, "text": text})
    lines = [line.split() for line in shown.splitlines()]
    assert ["piqa", "1.0", "5", "64", "acc", "0.6250", "0.0612"] in lines
    assert ["all", "\u2013", "\u2013", "\u2013", "words", "(strict)", "3", "\u2013"] in lines
    for stated in (
        "lm-eval 0.0",
        "first 64 questions",
        "STDERR",
        "tokens [1] before",
        "wiki.txt: loss 2.000, perplexity",
    ):
        assert stated in shown
    for stated in ("7.3891", "1,200 of 1,217 tokens in 17 windows", "RULE", "BOS", "ab12"):
        assert stated in shown
