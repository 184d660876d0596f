"""What a comparison measures at its end: looked at before the hours of training, and kept once it is made."""

import io

import pytest
from recipes_for_tests import tiny_recipe, write_recipe
from tokenizers import Tokenizer
from tokenizers.models import BPE

from orchestrator import comparison_stages
from orchestrator.command import Command
from orchestrator.comparison_checks import comparison_recipe
from orchestrator.comparison_command import compare
from orchestrator.console import Console
from orchestrator.stage import Context
from orchestrator.workspace import open_workspace
from shearing.errors import UserError


def test_a_text_that_the_source_cannot_be_scored_on_is_refused_at_the_start(tmp_path):
    """A tokenizer without a begin of text, found out after every method has been trained."""
    path = write_recipe(tmp_path)
    (tmp_path / "a.txt").write_text("word " * 200)
    vocabulary = {f"t{number}": number for number in range(319)} | {"</s>": 319}
    Tokenizer(BPE(vocabulary, merges=[])).save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    asked = ["pruning.gates.groups=null", f"comparison={{text: {{file: {tmp_path}/a.txt, bos: true}}}}"]
    command = Command(path, asked)
    with pytest.raises(UserError, match=r"comparison.text: bos: the tokenizer in .* names no begin"):
        compare(command, Console(io.StringIO()), io.StringIO())


def test_measures_are_kept_as_they_are_made(tmp_path):
    """One failure after hours of tasks that discards those of all models."""
    made = []

    def make():
        made.append(1)
        return {"tasks": {"piqa": len(made)}}

    def ask(*overrides):
        recipe = comparison_recipe(tiny_recipe(tmp_path, *overrides))
        context = Context(recipe, open_workspace(recipe), Console(io.StringIO()), None, fingerprints={"methods": "m"})
        return comparison_stages._made_once(context, "tasks/learned/before", make)

    assert ask() == ask() == {"tasks": {"piqa": 1}}
    assert ask("scores.decode_tokens=4") == {"tasks": {"piqa": 2}}, "asked for otherwise"
    assert open_workspace(tiny_recipe(tmp_path)).marks() == {}
