import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pipelines" / "shear.py"
sys.path.insert(0, str(ROOT / "tests" / "orchestrator"))

from recipes_for_tests import write_recipe  # noqa: E402


def shear(*arguments, cwd, env=None):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | (env or {}),
        timeout=120,
        check=False,
    )
    done.seconds = time.monotonic() - started
    return done


def test_every_problem_is_listed_and_the_status_is_2(tmp_path):
    """A traceback for a typing error sends people to the source; one problem a start sends them mad."""
    path = write_recipe(tmp_path)
    done = shear(
        path, "pruning.warmup_steps=99", "corpus.domains.wiki.proportion=0.5", "engine.workers=3", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "4 problems to mend" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n  - ") == 4
    assert done.seconds < 15  # 0.3 s when the machine is quiet
    assert not (tmp_path / "run").exists()


def test_unknown_keys_are_refused_with_a_suggestion(tmp_path):
    done = shear(write_recipe(tmp_path), "prunning.steps=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean pruning.steps?" in done.stderr


def test_a_missing_recipe_is_named(tmp_path):
    done = shear("nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "no recipe 'nowhere.yaml'" in done.stderr


def test_two_recipes_are_one_too_many(tmp_path):
    done = shear("a.yaml", "b.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "one recipe at a time" in done.stderr


def test_the_plan_starts_nothing_and_loads_nothing_heavy(tmp_path):
    """A plan that starts Ray cannot be asked for on a laptop while the cluster trains."""
    path = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = shear(path, "--plan", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "nothing is missing" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "pydantic" in loaded
    assert not loaded & {"torch", "ray", "transformers", "deepspeed", "matplotlib"}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_with_problems_shows_both_and_says_so(tmp_path):
    done = shear("--plan", write_recipe(tmp_path), "engine.workers=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "to be mended" in done.stdout
    assert "hidden_size" in done.stdout


def test_the_default_recipe_is_the_quickstart_from_anywhere(tmp_path):
    """The script finds its recipe beside itself, not beside the user."""
    done = shear("--plan", f"workspace={tmp_path}/w", f"corpus.path={tmp_path}/c", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run quickstart" in done.stdout


def test_the_script_runs_from_a_working_directory_without_the_package(tmp_path):
    """`ray job submit --working-dir .` puts that directory on PYTHONPATH and installs nothing."""
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' in p or 'lib/python' in p]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport orchestrator.command as c; print(c.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import site; site.main()\n" + program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.strip() == str(ROOT / "orchestrator" / "command.py"), done.stderr


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", "no Ray cluster could be joined there"),
        ("127.0.0.1:99999", "no Ray cluster could be joined there"),
        ("http://127.0.0.1:8265", "the dashboard's address"),
        ("ray://127.0.0.1:10001", "Ray Client's address"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path, address, expected):
    """Ray itself tries for minutes and then speaks of GCS."""
    done = shear(write_recipe(tmp_path), cwd=tmp_path, env={"RAY_ADDRESS": address})
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


WAITING = """
import sys, time
from orchestrator import command
def wait(*_):
    sys.stderr.write("waiting\\n"); sys.stderr.flush()
    time.sleep(60)
command._run = wait
sys.argv = ["pipelines/shear.py", "my recipe.yaml"]
sys.exit(command.run_command(command.Command("my recipe.yaml", []), sys.stdout, sys.stderr))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number, status):
    """Ctrl-C and `ray job stop` end with a traceback and leave the user guessing whether work is lost."""
    process = subprocess.Popen([sys.executable, "-c", WAITING], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == status
    assert f"stopped by {signal.Signals(number).name}" in text
    assert "python pipelines/shear.py 'my recipe.yaml'" in text
    assert "Traceback" not in text


def test_sigterm_while_ray_starts(tmp_path):
    """Ray's own handler, there until Ray has started, exits without a KeyboardInterrupt: it was told as SIGINT, 130."""
    program = WAITING.replace("time.sleep(60)", "sys.exit(15)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 143
    assert "stopped by SIGTERM" in done.stderr


def test_an_unforeseen_failure_has_status_1_and_its_traceback(tmp_path):
    program = WAITING.replace("time.sleep(60)", "1 / 0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "run the same again" in done.stderr
