import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "prepare_corpus.py"
RECIPE = """
name: small
corpus:
  path: {path}/corpora
  sequence_tokens: 64
  section_characters: 1000
  split: {{eval: 0.1}}
  domains: {{prose: {{text: "installed:prose?megabytes=0.2", proportion: 1}}}}
source:
  train:
    shape: {{num_layers: 1, hidden_size: 8, num_heads: 1, num_kv_heads: 1, head_size: 8, intermediate_size: 8}}
    tokenizer: {{vocab_size: 400}}
    steps: 1
    global_batch_tokens: 64
pruning: {{steps: 1, global_batch_tokens: 64, target: {{hidden_size: 4}}}}
recovery: {{steps: 1, global_batch_tokens: 64}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(path=tmp_path))
    return path


def run(recipe, *overrides):
    command = [sys.executable, SCRIPT, recipe, *overrides]
    return subprocess.run(command, cwd=recipe.parent, check=False, capture_output=True, text=True, timeout=300)


def test_a_recipe_becomes_a_corpus_and_a_table(recipe, tmp_path):
    """Bugs: the script does not run outside the repository; the table is of another corpus; Ray's chatter drowns it."""
    # what training takes of a cluster is not asked of the machine that cuts the text
    result = run(recipe, "engine.workers=16", "engine.gpus_per_worker=1")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["prose", "eval"], ["prose", "prune"], ["prose", "train"]]
    assert Path(rows[-1][1]).parent == tmp_path / "corpora"
    assert (Path(rows[-1][1]) / "manifest.json").exists()
    assert "ray" not in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_what_a_user_can_mend_ends_with_status_2(recipe):
    """Bug: a wrong path shows a traceback, after Ray took its seconds to start."""
    result = run(recipe, "corpus.domains.prose.text=/no/such/folder")
    assert result.returncode == 2
    assert "corpus.domains.prose.text: '/no/such/folder' does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    result = run(recipe, "corpus.path=gopher://host/corpora")
    assert result.returncode == 2
    assert "cannot open 'gopher://host/corpora'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_preparation_that_is_stopped_says_so(recipe):
    """Bug: Ctrl-C ends in a traceback out of Ray."""
    program = "import sys; sys.argv = sys.argv[1:]; import runpy, shearing.data.raw_files as files\n"
    program += "def stop(_): raise KeyboardInterrupt\n"
    program += "files.list_domains = stop; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, SCRIPT, recipe]
    result = subprocess.run(command, cwd=recipe.parent, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert "stopped by SIGINT" in result.stderr
    assert "Traceback" not in result.stderr
