"""The batch script: by shellcheck, and run with stand-ins for Slurm's two commands."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from journeys import end_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "shear.sbatch"
# Takes srun's own options off and runs the rest here, once for every "node". Two nodes of one machine cannot have the
# same ports: the second one's are left to chance.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
words=("$@")
if [[ "$*" == *--address=* ]]; then
  words=()
  for word; do [[ $word == --*-port=* ]] || words+=("$word"); done
  words+=(--dashboard-agent-listen-port=0)
fi
exec "${words[@]}"
"""


def interface() -> str:
    """One by which this machine reaches itself under an address that Ray takes for its own."""
    found = {name for name, addresses in psutil.net_if_addrs().items() for each in addresses
             if each.family == socket.AF_INET and not each.address.startswith("127.")}  # fmt: skip
    return min(found, default="lo")


def test_is_bash():
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status"), [(["--plan"], 0), (["pruning.stepps=3"], 2)], ids=["plan", "wrong recipe"]
)
def test_brings_a_cluster_up_and_down_around_the_run(tmp_path, words, status):
    """A head never found, nodes that nobody waits for, a lost status, processes and tokens left over."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho one\necho two\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    submitted = tmp_path / "checkout"
    submitted.mkdir()
    (submitted / "pipelines").symlink_to(ROOT / "pipelines")
    job = str(90_000 + os.getpid() % 1000)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "SHEAR_VENV": str(tmp_path / "venv"),
                    "SLURM_SUBMIT_DIR": str(submitted), "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]",
                    "SLURM_CPUS_PER_TASK": "2", "SHEAR_INTERFACE": interface()}  # fmt: skip
    folder = Path(tempfile.gettempdir()) / f"ray-{job}"
    try:
        done = subprocess.run(
            ["bash", str(SCRIPT), str(ROOT / "pipelines/recipes/quickstart.yaml"), *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=700, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        assert ("recovery" in done.stdout) == (status == 0)
        assert not list(submitted.glob(".shear-token-*")), "the token outlived its job"
        # the nodes are told to end when the script does
        left = [process for process in psutil.process_iter(["cmdline"])
                if str(folder) in " ".join(process.info["cmdline"] or [])]  # fmt: skip
        psutil.wait_procs(left, timeout=60)
        assert not [process for process in left if process.is_running() and process.status() != "zombie"]
    finally:
        end_of(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
