"""The command that slices, up to where it starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pipelines" / "slice_model.py"
sys.path.insert(0, str(ROOT / "tests" / "orchestrator"))

from recipes_for_tests import write_recipe  # noqa: E402


def slice_model(*arguments, cwd):
    words = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ, timeout=120, check=False)


def test_a_recipe_without_a_section_for_it_is_planned(tmp_path):
    """Catches a command that asks for sections that its method has no use for."""
    done = slice_model(write_recipe(tmp_path), "pruning=null", "recovery=null", "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 of 64 -> 48, then 1 of 64 -> 64" in done.stdout
    assert "recovery    continued" not in done.stdout
    assert not (tmp_path / "run").exists(), "--plan starts nothing"


def test_problems_are_listed_and_the_status_is_2(tmp_path):
    done = slice_model(
        write_recipe(tmp_path), "slicing={fraction: 0.2, hidden_size: 40}", "engine.workers=3", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "2 problems to mend" in done.stderr
    assert "Traceback" not in done.stderr
    unknown = slice_model(write_recipe(tmp_path), "slicing.fractoin=0.2", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean slicing.fraction?" in unknown.stderr
