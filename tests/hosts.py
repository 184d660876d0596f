"""Hosts on this machine, each with a network of its own: namespaces of the kernel, joined by a bridge."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clusters import STARTED
from journeys import ROOT, environment, wait_until

NETWORK = "10.213.77"  # nobody routes to it: it ends with the test


@dataclass(frozen=True)
class Host:
    """A host by name and address. `folder` is where Ray keeps its files, which all hosts see, as shared storage."""

    name: str
    address: str
    folder: str

    @property
    def words(self) -> dict[str, str]:
        """The environment of its processes."""
        return environment() | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self.folder,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT}/tests",  # before the folder of a driver's script, which holds `shearing` too
        }

    def start(self, *command: str, log: Path, **more: str) -> subprocess.Popen:
        """A process on this host."""
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], env=self.words | more, stdout=file, stderr=file
            )

    def start_ray(self, log: Path, *options: str) -> None:
        """A node of one CPU on this host, with Ray's own ports, once it answers."""
        node = ["ray", "start", "--block", "--num-cpus=1", f"--node-ip-address={self.address}", *options]
        process = self.start(*node, log=log)
        wait_until(lambda: process.poll() is not None or STARTED in log.read_text(), f"Ray on {self.name}", every_s=0.5)
        assert process.poll() is None, log.read_text()

    def cut_off(self) -> None:
        """Its cable is drawn: no packet comes or goes, and no connection is told."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def join(self) -> None:
        """Its cable is back."""
        ip("-n", self.name, "link", "set", "eth0", "up")

    def end(self) -> None:
        """End all that runs on it."""
        for process in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """So many hosts, which reach each other and nobody else."""
    bridge = f"shear{os.getpid()}"
    with contextlib.ExitStack() as ending, tempfile.TemporaryDirectory(prefix="shear-", dir="/tmp") as folder:
        ip("link", "add", bridge, "type", "bridge")
        ending.callback(ip, "link", "delete", bridge)
        ip("link", "set", bridge, "up")
        hosts = []
        for number in range(1, count + 1):
            host = Host(f"{bridge}-{number}", f"{NETWORK}.{number}", folder)
            ip("netns", "add", host.name)
            ending.callback(ip, "netns", "delete", host.name)
            ending.callback(host.end)
            ip("link", "add", f"{bridge}v{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            # by itself it would end with the namespace, which every process started meanwhile elsewhere may hold
            ending.callback(ip, "link", "delete", f"{bridge}v{number}")
            ip("link", "set", f"{bridge}v{number}", "master", bridge, "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.join()
            hosts.append(host)
        yield hosts


def allowed() -> bool:
    """Whether this user may make networks here."""
    words = ["unshare", "--net", "ip", "link", "add", "shear0", "type", "bridge"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
