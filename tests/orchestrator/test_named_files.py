"""What a user names is never what the run replaces."""

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from failing_storage import AWAY, failing_store
from recipes_for_tests import tiny_recipe, write_model, write_weights

import orchestrator.named_files
from orchestrator.console import Console
from orchestrator.methods import METHODS
from orchestrator.named_files import WRITTEN_FOLDERS, file_digest, named_files
from orchestrator.preflight import preflight
from orchestrator.stage import Context, run_stage
from orchestrator.stages import PRUNING, SOURCE
from orchestrator.workspace import open_workspace
from shearing.errors import UserError
from shearing.patience import StorageError

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


class NoRay:
    def start(self, _console):
        pass


def context_of(recipe):
    return Context(recipe, open_workspace(recipe), Console(io.StringIO()), NoRay())


def test_another_model_under_the_name_of_the_source_is_refused(tmp_path):
    """A finetuned model of the same sizes copied over the source: half of the run rests on each."""
    recipe, weights = tiny_recipe(tmp_path), tmp_path / "model/model.safetensors"
    write_weights(weights, a=np.zeros(2**20, np.float32), b=np.zeros(4, np.float32))
    run_stage(SOURCE, context_of(recipe))
    run_stage(SOURCE, context_of(recipe))
    write_weights(weights, a=np.zeros(2**20, np.float32), b=np.ones(4, np.float32))
    with pytest.raises(UserError, match=r"is not what it was when this run began: model\.safetensors changed"):
        run_stage(SOURCE, context_of(recipe))


@pytest.mark.parametrize("key", ["references.file", "mixture.rule"])
def test_a_file_of_other_text_is_another_input(tmp_path, monkeypatch, key):
    """References or a rule edited while a run stands still: it goes on with checkpoints that others have led to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses.yaml").write_text("wiki: 2.25\ncode: 1.5\n")
    (tmp_path / "my_rules.py").write_text("def best(state, losses, references): return state\n")
    file, keys = {
        "references.file": ("losses.yaml", ("references.kind=file", "references.file=losses.yaml")),
        "mixture.rule": ("my_rules.py", ("mixture.rule=my_rules:best",)),
    }[key]
    recipe = tiny_recipe(tmp_path, *keys)
    assert list(named_files(recipe)) == [key]
    open_workspace(recipe).begin("pruning", PRUNING.rests_on(context_of(recipe)))
    assert preflight(recipe) == []
    with (tmp_path / file).open("a") as text:
        text.write("# another\n")
    (problem,) = preflight(recipe)
    assert f"content of {key}: " in problem


def test_a_recipe_that_names_no_file_rests_on_what_it_always_did(tmp_path):
    """Work in progress refused after an update of this software."""
    assert set(PRUNING.rests_on(context_of(tiny_recipe(tmp_path)))) == {"recipe", "stages"}


def test_a_file_whose_storage_is_away_is_not_absent(tmp_path, monkeypatch):
    """Catches a run that is refused as one of another recipe, or does a stage again, because of an outage."""
    store, handler = failing_store(tmp_path)
    store.write_bytes("losses.yaml", b"a: 1\nb: 2\n")
    monkeypatch.setattr(orchestrator.named_files, "open_store", lambda _: store.child("losses.yaml").hasty())
    whole, ends = file_digest("mock://losses.yaml"), file_digest("mock://losses.yaml", 2)
    assert len({whole, ends, "absent"}) == 3
    handler.faults = itertools.repeat(AWAY)
    with pytest.raises(StorageError, match=r"reading mock://bucket/run/losses.yaml"):
        file_digest("mock://losses.yaml")
