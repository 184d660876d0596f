"""The command, as a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "orchestrator"))
from example_workspace import write_example  # noqa: E402


@pytest.fixture
def show(tmp_path):
    def run(*words):
        command = [sys.executable, str(ROOT / "pipelines/show_run.py"), str(tmp_path / "workspace"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_shows_once(show, tmp_path):
    write_example(tmp_path)
    done = show()
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert "report      to come" in done.stdout


def test_follows_to_the_end_in_json(show, tmp_path):
    """A follower that stays when the run is over; a NaN that no JSON reader takes."""
    store = write_example(tmp_path)
    store.write_json("stages/report.json", store.read_json("stages/scores.json") | {"stage": "report"})
    rows = store.read_bytes("metrics/scratch.jsonl").decode().splitlines()
    lost = json.loads(rows[-1])
    lost["losses"]["code"] = float("nan")
    store.write_bytes("metrics/scratch.jsonl", ("\n".join([*rows[:-1], json.dumps(lost)]) + "\n").encode())
    done = show("--follow", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    state = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert state["phase"]["domains"]["code"]["loss"] is None


def test_no_run_is_the_users_to_mend(show):
    done = show()
    assert done.returncode == 2
    assert "holds no recipe.yaml" in done.stderr
    assert "Traceback" not in done.stderr
