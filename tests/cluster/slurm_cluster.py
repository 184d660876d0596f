"""A small Slurm on this machine: its real daemons, on hosts with a network, a name and processes of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hosts import Host, allowed, ip, network
from journeys import ROOT, environment, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
CPUS = 8  # that a node declares, whatever the machine has
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
# As on clusters whose jobs share nodes: memory is handed out too, and a job has little of it unless it asks.
CONFIGURATION = """
ClusterName=shear
SlurmctldHost=desk({desk})
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n.spool
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# What a machine of its own has: a name, processes, /tmp and /dev/shm. `$shared` are folders below /tmp that all see.
MACHINE = """
hostname "$name"
for each in $shared; do
  mkdir -p "$own$each"
  mount --bind "$each" "$own$each"
done
mount --rbind "$own/tmp" /tmp
mount -t tmpfs tmpfs /dev/shm
"$@" &
wait
"""


@dataclass(frozen=True)
class Node:
    """A node by name; `own` holds its /tmp."""

    name: str
    host: Host
    own: Path
    shared: tuple[Path, ...]

    def start(self, daemon: list[str], log: Path) -> None:
        """Its Slurm daemon, and below that all that jobs start, in namespaces that end with it."""
        (self.own / "tmp").mkdir(parents=True, exist_ok=True)
        below_tmp = [str(each) for each in self.shared if str(each).startswith("/tmp/")]
        machine = ["unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words = [*machine, "bash", "-ec", MACHINE, self.name, *daemon]
        self.host.start(*words, log=log, name=self.name, own=str(self.own), shared=" ".join(below_tmp))

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs on it but Slurm's daemons, by their numbers on this machine."""
        found = {}
        for number in ip("netns", "pids", self.host.name).split():
            with contextlib.suppress(OSError):
                words = (
                    Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
                if words and not any(daemon in words for daemon in ("slurmd", "slurmstepd")):
                    found[int(number)] = words
        return found

    def find(self, words: str) -> list[int]:
        """The numbers of processes whose command line holds `words`."""
        return [number for number, command in self.processes().items() if words in command]

    def temporary(self, name: str) -> Path:
        """What is called so in its /tmp."""
        return self.own / "tmp" / name


@dataclass(frozen=True)
class Job:
    """How a job stands: Slurm's word for it, its exit status and signal, and how often it began anew."""

    state: str
    status: int
    signal: int
    restarts: int


@dataclass(frozen=True)
class Slurm:
    """A controller, from which jobs are submitted, and its nodes."""

    desk: Host
    nodes: list[Node]
    folder: Path

    @property
    def words(self) -> dict[str, str]:
        """The environment of a user: nothing of Ray's, and the tests' own interpreter and sources."""
        bare = {
            name: value for name, value in environment().items() if not name.startswith(("RAY_", "SLURM_", "SBATCH_"))
        }
        return bare | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}

    def say(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """What a command of Slurm's says on the controller's host. AssertionError where it fails."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.desk.name, *command],
            env=self.words | more, cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: str, cwd: Path, **more: str) -> int:
        """The job's number."""
        return int(self.say("sbatch", "--parsable", *words, cwd=cwd, **more))

    def job(self, number: int) -> Job:
        """How it stands now."""
        fields = dict(
            word.split("=", 1) for word in self.say("scontrol", "show", "job", "-o", str(number)).split() if "=" in word
        )
        status, signal = fields["ExitCode"].split(":")
        return Job(fields["JobState"], int(status), int(signal), int(fields["Restarts"]))

    def end(self, number: int, timeout_s: float = 900) -> Job:
        """How it ended, once it has."""
        wait_until(lambda: self.job(number).state in ENDED, f"the end of job {number}", timeout_s, every_s=1)
        return self.job(number)

    def start_node(self, node: Node) -> None:
        """Have a node in service."""
        configuration = str(self.folder / "slurm.conf")
        node.start(["slurmd", "-D", "-f", configuration], self.folder / f"{node.name}.log")

    def states(self) -> list[str]:
        """Slurm's words for its nodes."""
        return self.say("sinfo", "--noheader", "--Node", "--format=%T").split()


@contextlib.contextmanager
def slurm(count: int, *shared: Path) -> Iterator[Slurm]:
    """A Slurm of so many idle nodes, until the block ends; `shared` is what all of them see besides the sources."""
    with network(count + 1) as (desk, *hosts):
        folder = Path(desk.folder)
        seen = (folder, ROOT, Path(sys.prefix), *shared)
        nodes = [Node(f"node{n}", host, folder / f"node{n}", seen) for n, host in enumerate(hosts, 1)]
        cluster = Slurm(desk, nodes, folder)
        for host in (desk, *hosts):  # the script finds the nodes' network by the default route
            ip("-n", host.name, "route", "add", "default", "dev", "eth0")
        _configure(cluster)
        _start(cluster)
        try:
            wait_until(lambda: cluster.states() == ["idle"] * count, "idle nodes", 60, every_s=0.5)
        except AssertionError as error:
            logs = "\n".join(f"{log.name}: {log.read_text()}" for log in folder.glob("*.log"))
            raise AssertionError(logs) from error
        yield cluster


def _configure(cluster: Slurm) -> None:
    folder = cluster.folder
    folder.chmod(0o711)  # munged wants its socket to be reached by all users
    (folder / "state").mkdir()
    lines = [f"NodeName={node.name} NodeAddr={node.host.address} CPUs={CPUS} RealMemory=8000" for node in cluster.nodes]
    text = CONFIGURATION.format(desk=cluster.desk.address, folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(text)
    # the version only keeps the daemon from looking for one: no plugin above uses control groups
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for node in cluster.nodes:
        (folder / f"{node.name}.spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def _start(cluster: Slurm) -> None:
    folder, desk = cluster.folder, cluster.desk
    files = [
        f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "key-file", "pid-file", "seed-file")
    ]
    desk.start("munged", "--foreground", f"--log-file={folder}/munge.log", *files, log=folder / "munged.log")
    wait_until((folder / "munge.socket").exists, "munged", 30, every_s=0.2)
    controller = f"hostname desk && exec slurmctld -D -f {folder}/slurm.conf"
    desk.start("unshare", "--uts", "bash", "-c", controller, log=folder / "slurmctld.log")
    for node in cluster.nodes:
        cluster.start_node(node)


def possible() -> bool:
    """Whether Slurm is installed, and this user may make hosts for it here."""
    return all(shutil.which(daemon, path="/usr/sbin:/usr/bin") for daemon in DAEMONS) and allowed()
