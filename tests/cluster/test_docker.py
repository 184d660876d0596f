"""Images without building them: pins, user, and that all that they copy is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from docker_hosts import docker_run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = ("Dockerfile", "Dockerfile.cpu")
INSTALL = 'pip install --no-cache-dir ".[launcher]"'


def instructions(name):
    """(word, rest) of every instruction, continued lines joined and comments left out."""
    text = (ROOT / "cluster" / "docker" / name).read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_pins_are_the_projects(name):
    """An image whose torch pip replaces by another of several gigabytes, or whose Python the project refuses."""
    steps = instructions(name)
    (base,) = (rest for word, rest in steps if word == "FROM")
    least = re.search(r">=(\d+\.\d+)", PROJECT["requires-python"])[1]
    assert base == f"python:{least}-slim-bookworm"
    pins = dict(pin.split("==") for pin in PROJECT["dependencies"])
    named = [pin for word, rest in steps if word == "RUN" for pin in re.findall(r"\b([a-z]+==[\d.]+)", rest)]
    assert named == [f"torch=={pins['torch']}"], "everything else comes with the project"
    assert any(INSTALL in rest for word, rest in steps if word == "RUN")


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_nobody_special_with_bytecode_and_token(name):
    steps = instructions(name)
    assert steps[-1] == ("USER", "1000"), "the last word, or what follows runs as root"
    assert any("compileall" in rest for word, rest in steps)
    assert any("RAY_AUTH_MODE=token" in rest for word, rest in steps if word == "ENV")
    assert not [rest for word, rest in steps if word == "ADD" or "curl" in rest]
    assert not [rest for _, rest in steps if "NVIDIA_VISIBLE_DEVICES" in rest], "a pod would see all GPUs"


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher_puts_the_token_where_the_user_looks(name):
    """A token mounted in /root for a process of another home: it is the image's variables that are asked."""
    steps = instructions(name)
    set_here = [pair for word, rest in steps if word == "ENV" for pair in rest.split()]
    (made,) = (re.search(r"useradd --create-home --uid 1000 (\w+)", rest)[1] for _, rest in steps if "useradd" in rest)
    assert f"HOME=/home/{made}" in set_here
    config = yaml.safe_load((ROOT / "cluster" / "launcher" / "local.yaml").read_text())
    start = docker_run(config, set_here, as_head=True)
    assert f":/home/{made}/.ray/auth_token " in start


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_there_and_not_ignored(name):
    """A folder that was renamed, or that .dockerignore keeps out."""
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    order = [rest for word, rest in instructions(name) if word in ("COPY", "RUN")]
    installed = next(at for at, rest in enumerate(order) if INSTALL in rest)
    folders = [pattern.rstrip("*") for pattern in ("shearing*", "actors*", "orchestrator*")]
    assert all(f"{folder} {folder}" in order[:installed] for folder in folders)


def test_both_images_differ_in_what_they_are_for():
    """One of two copies that was mended alone; an index of wheels that nobody behind a mirror can replace."""
    gpu, cpu = (instructions(name) for name in NAMES)
    differing = [pair for pair in zip(gpu, cpu, strict=True) if pair[0] != pair[1]]
    (torch, installing) = differing
    assert [step[1].rpartition("/")[0] for step in torch] == ["TORCH_INDEX=https://download.pytorch.org/whl"] * 2
    assert all("DS_BUILD_OPS=0" in step[1] for step in installing)
    assert all(any('--index-url "$TORCH_INDEX"' in rest for _, rest in steps) for steps in (gpu, cpu))
