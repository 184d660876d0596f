"""Clusters of real Ray processes on this machine, each with ports and a folder of its own."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from journeys import end_of, end_with_children, environment, free_ports, wait_until

PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "metrics-export-port")  # fmt: skip
STARTED = "Ray runtime started"


@dataclass(frozen=True)
class Head:
    """A head by `ray start`: its process, its folder, and the environment of those who talk to it."""

    process: subprocess.Popen
    folder: str
    address: str
    words: dict[str, str]

    def kill(self) -> None:
        """End it without a word to anybody, with all that it started."""
        end_with_children(self.process)
        end_of(self.folder)


@contextlib.contextmanager
def started_head(log: Path, cpus: int, *options: str, port: int | None = None, **more: str) -> Iterator[Head]:
    """A head that answers, until the block ends.

    Args:
        log: File for what it says.
        cpus: That it declares.
        options: More of `ray start`.
        port: Of its store; default: a free one.
        more: More environment for it.
    """
    ports = free_ports(len(PORTS))
    ports[0] = port or ports[0]
    # Ray keeps its sockets below this folder, and a socket's path may be 107 characters long
    with tempfile.TemporaryDirectory(prefix="shear-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        words["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"] = f"{folder}/dashboards"
        words["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"  # where there is a dashboard
        words["PATH"] = f"{Path(sys.executable).parent}:{words['PATH']}"
        given = [f"--{name}={number}" for name, number in zip(PORTS, ports, strict=True)]
        command = ["ray", "start", "--head", "--block", f"--num-cpus={cpus}", f"--temp-dir={folder}", *given, *options]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=words | more, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        head = Head(process, folder, f"127.0.0.1:{ports[0]}", words)
        try:
            wait_until(lambda: process.poll() is not None or STARTED in log.read_text(), "the head", every_s=0.5)
            assert process.poll() is None, log.read_text()
            yield head
        finally:
            head.kill()
