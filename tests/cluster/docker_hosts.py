"""What Ray's launcher would do on a machine with docker: its own code, with the machine's answers made up."""

import json
from typing import Any

from ray.autoscaler._private.command_runner import DockerCommandRunner

ANSWERS = {"command -v docker": "/usr/bin/docker", "docker info": "map[nvidia:{nvidia-container-runtime [] <nil>}]"}


class Host:
    """A machine with GPUs: it notes what it is asked to do."""

    cluster_name, ssh_user = "shear", "ubuntu"

    def __init__(self, image_environment: list[str]) -> None:
        self.answers = ANSWERS | {"docker inspect -f '{{json .Config.Env}}'": json.dumps(image_environment)}
        self.commands: list[str] = []

    def run(self, command: str, **_: Any) -> bytes:
        self.commands.append(command)
        return next((said for start, said in self.answers.items() if command.startswith(start)), "").encode()


def docker_run(config: dict[str, Any], image_environment: list[str], as_head: bool) -> str:
    """The command by which the launcher starts a node's container.

    Args:
        config: A launcher's file.
        image_environment: `NAME=value` for all that the image sets.
        as_head: Whether the node is the head.
    """
    runner = DockerCommandRunner(
        config["docker"], log_prefix="", node_id="0", provider=None, auth_config=config["auth"], cluster_name="shear",
        process_runner=None, use_internal_ip=True,
    )  # fmt: skip
    runner.ssh_command_runner = host = Host(image_environment)
    runner.run_init(as_head=as_head, file_mounts=config["file_mounts"], sync_run_yet=True)
    (start,) = (command for command in host.commands if command.startswith("docker run"))
    return start
