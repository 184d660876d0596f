"""What a user names is never what the run replaces."""

import re
from pathlib import Path

import pytest
from recipes_for_tests import tiny_recipe, write_model

import orchestrator.named_files
from orchestrator.methods import METHODS
from orchestrator.named_files import WRITTEN_FOLDERS
from orchestrator.preflight import preflight

TRAINED = (
    "source={train: {steps: 1, global_batch_tokens: 512, tokenizer: {vocab_size: 320}, shape: {num_layers: 4, "
    "hidden_size: 64, num_heads: 4, num_kv_heads: 4, head_size: 16, intermediate_size: 172}}}"
)


@pytest.mark.parametrize("folder", ["model", "pruned", "sparse", "methods/learned/model", "scratch/inner"])
def test_a_source_in_a_folder_that_the_run_writes_is_refused(tmp_path, folder):
    """The export of the run's own model removes the only copy of the user's."""
    write_model(tmp_path / "run" / folder)
    (problem,) = preflight(tiny_recipe(tmp_path, f"source.model={tmp_path}/run/{folder}"))
    assert problem.startswith(f"source.model = '{tmp_path}/run/{folder}' lies in {tmp_path}/run/{folder.split('/')[0]}")


@pytest.mark.parametrize("folder", ["run/source", "run", "elsewhere/model", "run/models"])
def test_a_source_that_nothing_writes_is_taken(tmp_path, folder):
    """A second run on the source model that a first one trained, in the same workspace."""
    write_model(tmp_path / folder)
    assert preflight(tiny_recipe(tmp_path, f"source.model={tmp_path}/{folder}")) == []


def test_a_teacher_where_the_source_is_trained_is_refused(tmp_path):
    write_model(tmp_path / "run/source")
    found = preflight(tiny_recipe(tmp_path, TRAINED, f"recovery.distillation={{teacher: {tmp_path}/run/source}}"))
    assert any(problem.startswith("recovery.distillation.teacher = ") and "lies in" in problem for problem in found)


def test_text_in_a_folder_that_the_run_writes_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path)  # writes text/wiki
    (tmp_path / "run").mkdir()
    (tmp_path / "text/wiki").rename(tmp_path / "run/sliced")
    wiki = recipe.corpus.domains["wiki"].model_copy(update={"text": [f"{tmp_path}/run/sliced/*.jsonl"]})
    corpus = recipe.corpus.model_copy(update={"domains": recipe.corpus.domains | {"wiki": wiki}})
    (problem,) = preflight(recipe.model_copy(update={"corpus": corpus}))
    assert problem.startswith("corpus.domains.wiki.text = ")


def test_a_link_does_not_hide_it(tmp_path):
    """The same folder under another name."""
    write_model(tmp_path / "disk/model")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (problem,) = preflight(tiny_recipe(tmp_path, f"source.model={tmp_path}/disk/model"))
    assert "would be replaced and lost" in problem


def test_every_folder_that_the_orchestrator_writes_is_known():
    """A new stage with a folder of its own, in which a source model is not safe."""
    sources = Path(orchestrator.named_files.__file__).parent.glob("*.py")
    text = "".join(path.read_text() for path in sources)
    written = set(re.findall(r'store\.child\("([\w-]+)"\)', text)) | set(re.findall(r'_holds\("([\w-]+)/', text))
    written |= {folder for method in METHODS.values() for folder in (method.before, method.after) if folder}
    assert len(written) >= 10
    assert written <= set(WRITTEN_FOLDERS)
