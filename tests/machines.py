"""Machines within this one: hosts with files, processes and a user of their own, which are reached by ssh.

What a machine changes of this one's files only it sees, and it ends with the machine: `ray stop`, which ends every Ray
that it can see, ends the machine's own and no other.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from hosts import Host, allowed, ip, network
from journeys import ROOT, wait_until

USER, UID, HOME = "ubuntu", 1000, "/home/ubuntu"
SERVER = "Server listening"
# Makes a machine's root of this one's, and its files; then the ssh server is the machine's first process, and those who
# lose their parent are its children.
BOOT = f"""
set -e
mount -t tmpfs -o mode=755 machine "$ROOM"
mkdir "$ROOM/changed" "$ROOM/work" "$ROOM/root"
mount -t overlay -o "lowerdir=/,upperdir=$ROOM/changed,workdir=$ROOM/work" machine "$ROOM/root"
cd "$ROOM/root"
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs -o mode=1777 machine dev/shm
mount -t tmpfs -o mode=1777 machine tmp
mkdir -p shared run/sshd .{HOME}/.ssh
mount --bind "$SHARED" shared
for folder in $FOLDERS; do  # the machine's user may pass through the folders above these
  mkdir -p ".$folder"
  while folder=$(dirname "$folder"); [ "$folder" != / ]; do chmod go+x ".$folder"; done
done
for folder in $FOLDERS; do mount --bind "$folder" ".$folder"; done
sed -i '/:x:{UID}:/d' etc/passwd
echo '{USER}:*:{UID}:{UID}::{HOME}:/bin/bash' >>etc/passwd
cp "$KEYS/key" .{HOME}/.ssh/id_ed25519
cp "$KEYS/key.pub" .{HOME}/.ssh/authorized_keys
echo "export PATH=$VENV/bin:\\$PATH RAY_USAGE_STATS_ENABLED=0" >.{HOME}/.profile
touch .{HOME}/.bashrc
chown -R {UID}:{UID} .{HOME}
cp "$KEYS/server" etc/ssh/server
exec chroot . /usr/sbin/sshd -D -e -f /dev/null -h /etc/ssh/server -o "ListenAddress=$ADDRESS" \
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o Subsystem="sftp internal-sftp"
"""


@dataclass(frozen=True)
class Machine:
    """A host that runs: its first process as this machine numbers it, and its `/shared`, which all of them see."""

    host: Host
    process: int
    shared: Path

    @property
    def address(self) -> str:
        return self.host.address

    def start(self, line: str, log: Path) -> subprocess.Popen:
        """A line of bash as its user types it after logging in, in the checkout."""
        with log.open("w") as file:
            return subprocess.Popen(self._typed(line), stdout=file, stderr=subprocess.STDOUT, env=self._words)

    def run(self, line: str, timeout_s: float = 300) -> subprocess.CompletedProcess:
        """The same to its end."""
        return subprocess.run(
            self._typed(line), capture_output=True, text=True, timeout=timeout_s, check=False, env=self._words
        )

    def does(self, line: str) -> str:
        """What a line prints that has to succeed."""
        done = self.run(line)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def running(self, words: str) -> list[psutil.Process]:
        """Its processes whose command, or whose title, holds these words."""
        found = []
        for process in psutil.Process(self.process).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @property
    def _words(self) -> dict[str, str]:
        return {"HOME": HOME, "USER": USER, "LOGNAME": USER, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}

    def _typed(self, line: str) -> list[str]:
        into = ["nsenter", f"--target={self.process}", "--mount", "--net", "--pid", "--root", "--wd"]
        return [*into, f"--setuid={UID}", f"--setgid={UID}", "bash", "--login", "-c", f"cd {ROOT} && {line}"]


@contextlib.contextmanager
def machines(count: int, folder: Path) -> Iterator[list[Machine]]:
    """So many machines, each of which reaches the others by ssh with the key of its user.

    Args:
        count: Of them.
        folder: For `shared`, which all see as /shared, and for what their ssh servers say.
    """
    shared = folder / "shared"
    shared.mkdir()
    os.chown(shared, UID, UID)
    for name in ("key", "server"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    folders = dict.fromkeys(str(Path(each).resolve()) for each in (ROOT, sys.prefix, sys.base_prefix))
    words = {"SHARED": str(shared), "KEYS": str(folder), "VENV": sys.prefix, "FOLDERS": " ".join(folders)}
    with network(count) as hosts:
        found = []
        for host in hosts:
            # Ray takes the address of the way that leads out for the host's own, and without one a loopback's
            ip("-n", host.name, "route", "add", "default", "dev", "eth0")
            room, log = folder / host.name, folder / f"{host.name}.log"
            room.mkdir()
            apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", BOOT]
            started = host.start(*apart, log=log, ROOM=str(room), ADDRESS=host.address, **words)
            wait_until(lambda s=started, g=log: s.poll() is not None or SERVER in g.read_text(), f"ssh on {host.name}")
            assert started.poll() is None, log.read_text()
            (first,) = psutil.Process(started.pid).children()
            found.append(Machine(host, first.pid, shared))
        yield found


def possible() -> bool:
    """Whether there is all that machines are made of."""
    return allowed() and all(shutil.which(name) for name in ("sshd", "ssh-keygen", "rsync", "nsenter"))
