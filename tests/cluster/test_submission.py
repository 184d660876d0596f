"""What `ray job submit --working-dir .` takes along, by Ray's own packing."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
JUNK = (
    ".git/objects/ab", ".venv/lib/site.py", "runs/x/model/model.safetensors", "runs/x/metrics/recovery.jsonl",
    "corpora/f/cc/train/0.parquet", "data/wiki/a.jsonl.zst", "models/llama/config.json", "big/model.safetensors",
    "notes/huge.jsonl", "checkpoints/step/a.pt", "shearing/__pycache__/config.cpython-311.pyc", ".mypy_cache/x.json",
    ".pytest_cache/x", "wandb/run/x", "tests/x.py", "shear.egg-info/PKG-INFO",
)  # fmt: skip


@pytest.fixture
def package(tmp_path):
    """Names in the package of a checkout in which somebody has worked."""
    checkout = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in [*listed.splitlines(), ".rayignore"]:
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"0" * 1000)
    target = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def test_all_that_runs_goes_along_and_nothing_else(package):
    """shearing/data and shearing/models left behind with the data and models of a user; a corpus of gigabytes taken."""
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("shearing", "actors", "orchestrator", "pipelines")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= package
    assert not package & set(JUNK)
    beside = {name for name in package - wanted if "/" in name}
    assert beside == set(), "of the rest only single files at the top"
