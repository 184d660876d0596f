"""The batch script: by shellcheck, and with stand-ins for all that it calls; under a real Slurm in test_real_slurm."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "shear.sbatch"


def test_is_bash():
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Stand-ins for all that the script calls: they note what they were given and do nothing.
NOTES = """#!/bin/bash
name=${0##*/}
while [[ ${1-} == --* ]]; do shift; done
echo "$name ${*//$'\n'/ } cpus=${SRUN_CPUS_PER_TASK-none} umask=$(umask)" >>"$NOTES"
case "$name $*" in
  *"ip -o -4 addr"*) echo "$HEAD_IP" ;;
  *"ray start"*) exec sleep 30 ;;
  "python -c"*) echo token ;;
  *shear.py*) stat -c 'token %a' "$RAY_AUTH_TOKEN_PATH" >>"$NOTES" ;;
esac
"""


def run_with_stand_ins(folder, **given):
    """The script on two nodes where nothing is really started: (how it ended, what its commands noted)."""
    tools = folder / "venv" / "bin"
    tools.mkdir(parents=True)
    texts = dict.fromkeys(("srun", "ray", "python"), NOTES) | {"activate": f"PATH={tools}:$PATH\n"}
    texts |= {"ip": "#!/bin/sh\nexit 2\n", "scontrol": "#!/bin/sh\necho one\necho two\n"}
    for name, text in texts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "NOTES": f"{folder}/notes", "SHEAR_VENV": str(folder / "venv"),
                   "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
                   "SLURM_CPUS_PER_TASK": "96"}  # fmt: skip
    (folder / "notes").touch()
    done = subprocess.run(
        ["bash", "-c", f"umask 022; source {SCRIPT} recipe.yaml"],
        env=environment | given, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not list(folder.glob(".shear-token-*")), "the token outlived its job"
    return done, (folder / "notes").read_text().splitlines()


def test_every_step_has_the_jobs_cpus_and_the_run_its_own_umask(tmp_path):
    """96 CPUs declared to Ray where each step holds one; results that no colleague may read; a token that all may."""
    done, notes = run_with_stand_ins(tmp_path, SHEAR_INTERFACE="ib0", HEAD_IP="10.0.0.1")
    assert done.returncode == 0, done.stderr
    steps = [note for note in notes if note.startswith("srun ")]
    assert len(steps) == 4, "the head's address, the head, the others, what they left in /tmp"
    assert all("cpus=96" in step for step in steps)
    (run,) = (note for note in notes if "shear.py recipe.yaml" in note)
    assert run.endswith("umask=0022")
    assert "token 600" in notes


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "SHEAR_INTERFACE=ib0 sbatch"), ({"SHEAR_INTERFACE": "eth7", "HEAD_IP": ""}, "SHEAR_INTERFACE=eth7")],
    ids=["no default route", "no address"],
)
def test_an_unknown_network_is_said_before_anything_starts(tmp_path, given, says):
    """A node without a default route: an empty name, and five minutes later a head that did not come up."""
    done, notes = run_with_stand_ins(tmp_path, **given)
    assert done.returncode == 2
    assert says in done.stderr
    assert not [note for note in notes if "ray start" in note]
