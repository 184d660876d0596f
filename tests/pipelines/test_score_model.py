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


def test_a_vocabulary_too_small_is_refused(folder):
    """An index error in the embedding, after half a minute."""
    write_corpus(folder, "aaaa")
    assert "knows 400 tokens, the corpus was made with a tokenizer of 500" in refused(
        run(folder, "model", "recipe.yaml")
    )


def test_the_table_states_its_protocol():
    """Perplexities without the windows and the rule of beginning that they hold for."""
    spec = importlib.util.spec_from_file_location("score_model_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
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
