import json
import subprocess
import sys

import pytest
from ray.runtime_env.runtime_env import _merge_runtime_env
from recipes_for_tests import tiny_recipe

from orchestrator import ray_session
from orchestrator.ray_session import logical_cpus

STARTED = """
import io, signal, sys
from orchestrator.console import Console
from orchestrator.ray_session import RaySession, _is_autoscaling
from orchestrator.recipe_loading import load_recipe
recipe = load_recipe(sys.argv[1], ["engine.workers=3", "engine.cpus_per_worker=2"])
mine = lambda *_: None
signal.signal(signal.SIGTERM, mine)
with RaySession(recipe) as session:
    session.start(Console(io.StringIO()))
    session.start(Console(io.StringIO()))
    import ray
    from ray.data import DataContext
    assert signal.getsignal(signal.SIGTERM) is mine, "Ray's handler would end the run without a word"
    assert ray.cluster_resources()["CPU"] >= 10, "workers, actors and read tasks do not fit"
    assert DataContext.get_current().execution_no_progress_timeout_s == -1
    assert not DataContext.get_current().enable_progress_bars
    assert not _is_autoscaling()
    value = ray.get(ray.remote(lambda: __import__("os").environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]).remote())
    assert float(value) < 1, "each report of a worker would block for two seconds"
    seen = ray.get(ray.remote(lambda: __import__("os").environ.get("CUDA_VISIBLE_DEVICES")).remote())
    assert seen == "", "what runs without a GPU of its own would take the first of the node"
assert not ray.is_initialized()
print("fine")
"""


JOINED = """
import io, sys
from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.recipe_loading import load_recipe
from shearing.errors import UserError
stream = io.StringIO()
with RaySession(load_recipe(sys.argv[1], [])) as session:
    session.start(Console(stream))
    import ray
    assert ray.cluster_resources()["CPU"] == 3, "another Ray than the cluster's"
assert "joining the Ray cluster" in stream.getvalue()
try:
    with RaySession(load_recipe(sys.argv[1], ["engine.workers=8"])) as session:
        session.start(Console(stream))
except UserError as error:
    print(error)
"""


@pytest.fixture
def recipe(tmp_path):
    return lambda *overrides: tiny_recipe(tmp_path, *overrides)


def test_an_embedded_ray_declares_enough_for_everyone(recipe):
    assert logical_cpus(recipe("engine.workers=3", "engine.cpus_per_worker=2")) >= 3 * 2 + 2 + 2
    assert logical_cpus(recipe("comparison.workers=9", "engine.cpus_per_worker=2")) >= 9 * 2 + 2 + 2


def test_a_session_starts_once_quietly_and_ends(tmp_path, recipe):
    recipe()
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(tmp_path / "tiny.yaml")],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr
    assert done.stderr == ""


def test_a_session_joins_the_cluster_that_the_environment_names(tmp_path, recipe):
    """A run meant for the cluster that quietly starts its own Ray trains on the head node alone."""
    recipe()
    program = (
        "import os, subprocess, sys\nfrom ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 3, 'include_dashboard': False})\n"
        "try:\n"
        "    done = subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]], capture_output=True, text=True,\n"
        "        env=os.environ | {'RAY_ADDRESS': cluster.address})\n"
        "finally:\n    cluster.shutdown()\nprint(done.stdout, done.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, JOINED, str(tmp_path / "tiny.yaml")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert "engine.workers = 8 with engine.cpus_per_worker = 0.5 need 4 CPUs; the cluster has 3." in done.stdout, done
    assert "Traceback" not in done.stdout


def test_a_job_may_set_what_a_run_sets_too(monkeypatch):
    """A job with one of our variables in its own environment was told that there is no cluster to join."""
    job = {"working_dir": "gcs://x.zip", "env_vars": {"HF_HUB_OFFLINE": "0", "RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("RAY_TQDM", "0")
    names = ("HF_HUB_OFFLINE", "RAY_TQDM")
    assert ray_session._variables(names) == {"HF_HUB_OFFLINE": "0", "RAY_TQDM": "0"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job}))
    merged = _merge_runtime_env(job, {"env_vars": ray_session._variables(names)})
    assert merged["env_vars"] == job["env_vars"] | {"RAY_TQDM": "0"}


def test_only_rays_own_folder_is_rays(tmp_path, monkeypatch):
    """A user whose name begins as Ray's does, told that the workspace will be removed."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch")

    def warned(folder):
        recipe = tiny_recipe(tmp_path, f"workspace={folder}", f"corpus.path={folder}")
        return ray_session._folder_warnings(recipe, is_embedded=False, nodes=1)

    assert warned("/scratch/raymond/run") == []
    inside = warned("/scratch/ray/session_1/run")
    assert len(inside) == 2
    assert "which Ray removes in time; give an absolute path" in inside[0]
