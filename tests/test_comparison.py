"""The comparison by its real command: killed in the middle, gone on with, and what it leaves read by other readers."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from journeys import ROOT, end_with_children, environment, small_journey, wait_until
from safetensors.torch import load_file

from orchestrator.recipe import COMPARED_METHODS
from orchestrator.recipe_schema import every_key
from shearing.models.loading import load_model

SCRIPT = ROOT / "pipelines" / "compare_methods.py"
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
METHODS = ("random", "slicegpt", "sparsegpt_2_4")
FEW = (
    "engine.workers=1", "engine.zero_stage=1", "comparison.at_once=2", "evaluation.sequences_per_domain=4",
    "recovery.steps=8", "recovery.checkpoint_every_steps=4", "slicing.calibration.sequences=8",
    "sparsifying.calibration.sequences=8",
)  # fmt: skip


def start(journey, *more):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *journey.arguments, *FEW, *more, "--methods", *METHODS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), start_new_session=True,
    )  # fmt: skip


def finish(process, timeout_s):
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        end_with_children(process)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_methods_killed_in_the_middle_and_gone_on_with(tmp_path):
    """Training inside a Ray task that no test of a stage sees; two runs of one cluster that share an actor by its name;
    a method begun anew after the kill; zeros that recovery fills."""
    journey = small_journey(tmp_path / "compared")
    first = start(journey)
    runs = journey.workspace / "methods"
    begun = [runs / name / "stages" / "recovery.json" for name in METHODS]
    try:
        wait_until(lambda: any(mark.exists() for mark in begun), "a recovery to begin", timeout_s=900, every_s=0.5)
    finally:
        end_with_children(first)
    kept = {path: path.read_text() for path in runs.glob("*/stages/*.json") if json.loads(path.read_text())["finished"]}
    assert kept, "nothing had been finished by then"

    code, out, err = finish(start(journey), 1200)
    assert code == 0, err
    assert "Traceback" not in err
    assert {path: path.read_text() for path in kept} == kept, "what was finished was done again"
    check_found(journey, out)
    check_zeros(runs / "sparsegpt_2_4")

    marks = {path: path.stat().st_mtime_ns for path in journey.workspace.rglob("stages/*.json")}
    code, again, err = finish(start(journey), 120)
    assert code == 0, err
    assert err.count("finished already") == 6
    assert {path: path.stat().st_mtime_ns for path in marks} == marks
    assert again.splitlines()[0] == out.splitlines()[0], "another verdict of the same figures"


def check_found(journey, out):
    """The page's figures are those that the models on disk have."""
    found = journey.json("comparison/comparison.json")
    assert out.startswith(found["verdict"])
    assert f"page    {journey.workspace}/comparison/index.html" in out
    assert (journey.workspace / "comparison/index.html").read_text().count("<svg") == 3
    methods = {method["name"]: method for method in found["methods"]}
    assert set(methods) == set(METHODS)
    most = methods["random"]["parameters"]
    assert 0.8 * most < methods["slicegpt"]["parameters"] <= most
    for name, method in methods.items():
        folder = journey.workspace / "methods" / name / "model"
        model = load_model(folder)
        assert method["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert method["disk_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert method["before"]["mean_loss"] > method["after"]["mean_loss"], f"recovery taught {name} nothing"
        assert method["decode_tokens_per_s"] > 0
        assert (journey.workspace / "methods" / name / "console.log").stat().st_size > 0
        assert method["tokens"]["recovery"] == 8 * 512
        assert math.isclose(
            method["after"]["to_source"]["nats"],
            method["after"]["mean_loss"] - found["source"]["mean_loss"],
            abs_tol=1e-9,
        )
    assert methods["sparsegpt_2_4"]["tokens"]["calibration"] == 8 * 64


def check_zeros(run):
    """No group of four has more than two weights, before and after recovery, and recovery has moved the others."""
    before, after = (load_file(run / name / "model.safetensors") for name in ("sparse", "model"))
    linears = [name for name in before if ".layers." in name and before[name].ndim == 2]
    assert len(linears) == 3 * 7
    for name in linears:
        kept = after[name].unflatten(1, (-1, 4)) != 0
        assert int(kept.sum(-1).max()) <= 2
        assert torch.equal(kept, before[name].unflatten(1, (-1, 4)) != 0)
        assert not torch.equal(before[name], after[name])


def test_the_page_on_comparing_names_what_there_is():
    """A method that the page does not know, or a key that was renamed since."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(COMPARED_METHODS)
    sections = "pruning|slicing|sparsifying|comparison|recovery|scratch"
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)`", PAGE)) - {"comparison.json", "comparison.md"}
    assert len(named) >= 7
    assert named <= set(every_key())


def test_the_pages_commands_and_recipe_are_good(tmp_path):
    """A command that is wrong, and an example of a section that is refused."""
    commands = re.findall(r"^    (python .*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 3
    (section,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    recipe = (ROOT / "pipelines/recipes/comparison-quickstart.yaml").read_text()
    (tmp_path / "wiki.txt").write_text("some text")
    section = section.replace("/data/wikitext-2-test.txt", str(tmp_path / "wiki.txt")).replace("2048", "512")
    (tmp_path / "recipe.yaml").write_text(re.sub(r"^comparison:.*$", "", recipe, flags=re.MULTILINE) + section)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    for words in [*(command.split()[2:] for command in commands), [str(tmp_path / "recipe.yaml")]]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *dict.fromkeys([*words, "--plan"])],
            cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nothing is missing" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_task_that_there_is_not_is_refused_before_anything_starts(tmp_path):
    """A misspelt task that is found out after every method has been trained."""
    pytest.importorskip("lm_eval")
    journey = small_journey(tmp_path / "small")
    (tmp_path / "tasks").mkdir()
    wanted = f"comparison.tasks={{names: [no_such_task], files: {tmp_path}/tasks}}"
    code, _, err = finish(start(journey, wanted), 240)
    assert code == 2, err
    assert "no_such_task" in err
    assert not journey.workspace.exists()
