"""The launcher's files by Ray's own schema, offline; and what they promise about tokens, storage and prices."""

import ast
import copy
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from docker_hosts import docker_run
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.ray_session import ADDRESS_VARIABLE

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster" / "launcher").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request):
    return yaml.safe_load(request.param.read_text())


def test_all_three_are_there():
    assert [path.stem for path in FILES] == ["aws", "gcp", "local"]
    assert ADDRESS_VARIABLE == "RAY_ADDRESS"  # what cluster/README.md has readers set


def test_rays_own_schema(config):
    """A key that `ray up` refuses, or fills in otherwise than one thinks."""
    prepared = prepare_config(config)
    validate_config(prepared)
    bounds = {
        name: (kind["min_workers"], kind["max_workers"]) for name, kind in prepared["available_node_types"].items()
    }
    if config["provider"]["type"] == "local":
        assert (2, 2) in bounds.values()
    else:
        assert bounds == {"head": (0, 0), "gpu_on_demand": (1, 4), "gpu_spot": (0, 4)}


def test_the_clouds_libraries_come_along():
    """A head that cannot start a worker, as nothing in its image speaks to the cloud: Ray does not bring it."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["launcher"]
    brings = {"boto3": {"boto3", "botocore"}, "google-auth-httplib2": {"google_auth_httplib2"}}
    brings |= {"google-api-python-client": {"googleapiclient", "google", "httplib2"}}
    assert {pin.split("==")[0] for pin in pins} == set(brings)
    imported = set()
    for cloud in ("aws", "gcp"):
        for path in (Path(ray.__file__).parent / "autoscaler" / "_private" / cloud).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
                imported |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    foreign = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"ray", "packaging"}
    assert foreign == set.union(*brings.values())


def test_a_misspelt_key_is_refused(config):
    """Keeps the test above from passing on anything."""
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(config | {"idle_timeout_minuts": 5}))


COMMANDS = ("initialization_commands", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def test_every_command_is_shell_as_ray_wraps_it(config):
    """A comment of YAML's that lies within a block: it is the command's then, and swallows Ray's closing bracket."""
    commands = [command for key in COMMANDS for command in prepare_config(config)[key]]
    assert len(commands) >= 4
    for command in commands:
        assert " # " not in command
        wrapped = " ".join(_with_interactive(command))
        for text in (f"true && ({command})", shlex.split(wrapped)[-1]):
            done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_every_ray_starts_with_the_token_and_no_open_dashboard(config):
    """A cluster on which everybody who reaches a port runs what they like."""
    starts = [command for key in ("head", "worker") for command in config[f"{key}_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    text = str(config)
    assert "0.0.0.0" not in text
    assert "--volume /shared:/shared" in text


def test_who_may_reach_aws_nodes_is_the_users_own_group():
    """Ssh open to the internet: Ray lets it into each group that it makes. With none to make it asks nobody."""
    config = yaml.safe_load(FILES[0].read_text())
    assert aws._configure_security_group(copy.deepcopy(config)) == config
    assert "security_group" not in config["provider"], "it would be read as a limit, which it is not"
    rules = aws._create_default_inbound_rules(["sg-1"], [{"IpRanges": [{"CidrIp": "203.0.113.0/24"}]}])
    assert "0.0.0.0/0" in str(rules), "Ray has mended it: the file may go back to a group of Ray's"


def test_workers_hold_less_than_the_head_and_may_pull_the_image():
    """A worker whose program may start machines at your cost; one that the registry turns away."""
    aws_kinds, gcp_kinds = (yaml.safe_load(path.read_text())["available_node_types"] for path in FILES[:2])
    profile = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in aws_kinds.items()}
    assert profile["gpu_spot"] == profile["gpu_on_demand"] != profile["head"]
    assert all(gcp_kinds[name]["node_config"]["serviceAccounts"] for name in ("gpu_spot", "gpu_on_demand"))
    for path in FILES[:2]:
        config = yaml.safe_load(path.read_text())
        registry = config["docker"]["image"].split("/")[0]
        assert [command for command in config["initialization_commands"] if "docker" in command and registry in command]


def test_the_user_may_write_where_runs_go(config, tmp_path):
    """A new file system, which is root's: the run is refused after minutes of starting machines."""
    commands = config["initialization_commands"]
    (check,) = (command for command in commands if "id -u" in command)
    (made,) = (command for command in commands if "/shared/runs /shared/corpora" in command)
    assert made.startswith(("sudo install -d -o 1000 -g 1000 ", "mkdir -p "))
    assert commands.index(check) == 0
    mounts = [command for command in commands if "mountpoint" in command]
    assert all(commands.index(mount) < commands.index(made) for mount in mounts)
    (tmp_path / "id").write_text("#!/bin/sh\necho ${UID_SAID}\n")
    (tmp_path / "id").chmod(0o755)
    for uid, status in (("1000", 0), ("1001", 1)):
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "UID_SAID": uid}
        done = subprocess.run(["bash", "-c", f"true && ({check})"], env=path, capture_output=True, check=False)
        assert done.returncode == status


def test_containers_of_gpu_nodes_see_the_gpus(config):
    """GPUs that Ray counts and torch does not find: `--runtime=nvidia` shows none to an image that asks for none."""
    start = docker_run(config, ["PATH=/usr/bin"], as_head=False)
    assert "--runtime=nvidia" in start
    assert "--env NVIDIA_VISIBLE_DEVICES=all --env NVIDIA_DRIVER_CAPABILITIES=compute,utility" in start


def test_machines_bring_a_driver_for_the_images_torch():
    """Ray's default for AWS, of 2023; a container that starts before its node's driver is built."""
    aws_kinds, gcp_kinds = (yaml.safe_load(path.read_text())["available_node_types"] for path in FILES[:2])
    named = {kind["node_config"]["ImageId"] for kind in aws_kinds.values()}
    assert len(named) == 1
    assert not named & set(aws.DEFAULT_AMI.values())
    (image,) = {disk["initializeParams"]["sourceImage"]
                for kind in gcp_kinds.values() for disk in kind["node_config"]["disks"]}  # fmt: skip
    assert int(re.search(r"-nvidia-(\d+)$", image)[1]) >= 525, "the least for CUDA 12"
    assert "install-nvidia-driver" not in str(gcp_kinds)


@pytest.mark.parametrize("path", FILES[:2], ids=lambda path: path.stem)
@pytest.mark.parametrize("reached", [True, False])
def test_docker_is_reached_and_nfs_is_there_before_they_are_used(path, reached, tmp_path):
    """An image whose user is outside of docker's group; a mount without a helper. Each stops `ray up` at its node."""
    commands = yaml.safe_load(path.read_text())["initialization_commands"]
    (docker,) = (command for command in commands if "docker.sock" in command)
    (nfs,) = (command for command in commands if "nfs-common" in command)
    mount = next(command for command in commands if "mountpoint" in command)
    logins = [command for command in commands if "docker login" in command or "configure-docker" in command]
    assert commands.index(nfs) < commands.index(mount)
    assert all(commands.index(docker) < commands.index(login) for login in logins)
    for name, text in {"docker": f"exit {int(not reached)}", "sudo": f'echo "$@" >> {tmp_path}/done'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for command in (docker, nfs.replace("/sbin/mount.nfs", "/bin/sh" if reached else "/no/helper")):
        done = subprocess.run(
            ["bash", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "USER": "ubuntu"},
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    asked = (tmp_path / "done").read_text() if (tmp_path / "done").exists() else ""
    assert ("usermod -aG docker ubuntu" in asked) == ("chown ubuntu /var/run/docker.sock" in asked) == (not reached)
    assert ("install --yes nfs-common" in asked) == (not reached)


def test_spot_and_on_demand_are_the_same_machine():
    """A spot node whose GPUs do not fit beside the others in one group of workers."""
    for path in FILES[:2]:
        kinds = yaml.safe_load(path.read_text())["available_node_types"]
        spot, sure = kinds["gpu_spot"], kinds["gpu_on_demand"]
        assert spot["resources"] == sure["resources"]
        differing = {key for key in spot["node_config"] if spot["node_config"][key] != sure["node_config"].get(key)}
        assert len(differing) == 1, "the market alone"
