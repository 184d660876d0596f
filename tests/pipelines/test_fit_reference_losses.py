"""The command that predicts reference losses, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pipelines" / "fit_reference_losses.py"
LOSSES = """
parameters: [6738415616, 13015864320, 68976648192]
losses:
  cc: [1.7520, 1.6680, 1.4621]
  wiki: [1.4844, 1.3945, 1.2118]
"""


def run(folder: Path, *arguments: str, text: str = LOSSES) -> subprocess.CompletedProcess:
    (folder / "losses.yaml").write_text(text)
    command = [sys.executable, str(SCRIPT), "losses.yaml", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_table_has_predictions_and_warnings(tmp_path):
    done = run(tmp_path, "--parameters", "1345423360", "--unbounded")
    assert done.returncode == 0, done.stderr
    assert "1.9643" in done.stdout
    assert "1.7590" in done.stdout
    assert done.stdout.count("no degrees of freedom") == 1
    assert "warning: cc: the irreducible loss is negative" in done.stdout
    assert done.stdout.count("unknown") == 2  # standard errors


def test_four_models_give_standard_errors(tmp_path):
    text = "parameters: [1.0e+8, 1.0e+9, 1.0e+10, 1.0e+11]\nlosses: {a: [3.1, 2.5, 2.12, 1.8]}"
    found = json.loads(run(tmp_path, "--parameters", "5e7", "--json", text=text).stdout)
    assert 0 < found["domains"]["a"]["standard_error"] < 1
    shown = run(tmp_path, "--parameters", "5e7", text=text).stdout
    assert f"{found['domains']['a']['standard_error']:.4f}" in shown


def test_json_is_bounded_unless_told_otherwise(tmp_path):
    """Catches --unbounded read the wrong way round."""
    done = run(tmp_path, "--parameters", "2.70156032e9", "--json")
    found = json.loads(done.stdout)
    assert found["domains"]["cc"]["c"] == 0.0
    assert found["domains"]["wiki"]["loss"] == pytest.approx(1.6297, abs=5e-5)


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("--parameters", "1e9"), "parameters: [1, 2]\nlosses: {a: [2, 1]}", "at least three sizes"),
        (("--parameters", "1e9"), "nothing", "not a mapping"),
        (("--parameters", "0"), LOSSES, "allowed: a number of parameters"),
        (("--parameters", "many"), LOSSES, "invalid float"),
        ((), LOSSES, "--parameters"),
    ],
)
def test_bad_input_is_status_2_without_a_traceback(tmp_path, arguments, text, message):
    done = run(tmp_path, *arguments, text=text)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_starts_without_torch_or_ray(tmp_path):
    """Catches a heavy import on the way: a fit of seven numbers must not take seconds."""
    code = (
        f"import runpy, sys; sys.argv = ['x', 'losses.yaml', '--parameters', '1e9']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        f"except SystemExit: pass\n"
        f"assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules)"
    )
    (tmp_path / "losses.yaml").write_text(LOSSES)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
