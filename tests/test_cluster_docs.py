"""What cluster/README.md says: paths, commands' options, and names that other files have."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")


def test_paths_and_links_resolve():
    """A file that was renamed."""
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (ROOT / "cluster" / link).exists(), link
    named = re.findall(r"\b((?:pipelines|cluster|tests)/[\w./-]*\w)", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for folder, files in re.findall(r"^    (\w+)/ +([\w., -]+?)(?:   .*)?$", TEXT, flags=re.MULTILINE):
        for name in files.split(", "):
            assert (ROOT / "cluster" / folder / name).is_file(), name


def test_every_folder_is_told_of():
    """A way to run that nobody finds."""
    there = {path.name for path in (ROOT / "cluster").iterdir() if path.is_dir()}
    assert there == set(re.findall(r"^    (\w+)/ ", TEXT, flags=re.MULTILINE))


@pytest.mark.parametrize(
    "words", ["up", "down", "dashboard", "job submit", "job stop", "job status", "get-auth-token", "drain-node"]
)
def test_rays_commands_exist(words):
    """A command of another release of Ray, or an option that it does not take."""
    assert f"ray {words}" in TEXT
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    done = subprocess.run([ray, *words.split(), "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    used = {option for line in TEXT.splitlines() for option in re.findall(rf"ray {words} (.*)", line)}
    for options in used:
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", re.split(r" -- |\$\(", options)[0]):
            assert option in done.stdout, option


def test_the_batch_scripts_variables_are_told_of():
    """A variable that only a reader of the script finds."""
    script = (ROOT / "cluster" / "slurm" / "shear.sbatch").read_text()
    names = set(re.findall(r"\bSHEAR_[A-Z]+", script))
    assert names == {"SHEAR_VENV", "SHEAR_INTERFACE"}
    assert all(f"`{name}`" in TEXT for name in names)


def test_what_clouds_are_told_is_what_the_files_say():
    """A group, a profile or an account that is made under one name and asked for under another."""
    launcher = ROOT / "cluster" / "launcher"
    kinds = yaml.safe_load((launcher / "aws.yaml").read_text())["available_node_types"].values()
    for node in (kind["node_config"] for kind in kinds):
        assert f"`{node['IamInstanceProfile']['Name']}`" in TEXT
        (group,) = node["SecurityGroupIds"]
        assert f"--group-id {group} --protocol tcp --port 22 --cidr " in TEXT
        assert f"--group-id {group} --protocol all --source-group {group}" in TEXT
    google = yaml.safe_load((launcher / "gcp.yaml").read_text())
    project = google["provider"]["project_id"]
    head = f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"  # as Ray calls it
    accounts = {account["email"] for kind in google["available_node_types"].values()
                for account in kind["node_config"].get("serviceAccounts", [])}  # fmt: skip
    for account in accounts | {head}:
        assert f"service-accounts create {account.split('@')[0]} --project {project}" in TEXT
        assert f"{project} --role roles/artifactregistry.reader --member serviceAccount:{account}" in TEXT
    assert "pip install '.[launcher]'" in TEXT


def test_kubernetes_names_are_the_files():
    """A port-forward to a service that has another name; logs of a job that is not there."""
    documents = {name: list(yaml.safe_load_all((ROOT / "cluster" / "kuberay" / name).read_text()))[-1]
                 for name in ("raycluster.yaml", "rayjob.yaml")}  # fmt: skip
    names = {name: document["metadata"]["name"] for name, document in documents.items()}
    assert f"service/{names['raycluster.yaml']}-head-svc" in TEXT
    job = f"job/{names['rayjob.yaml']}"
    steps = [
        "kubectl apply --namespace shear -f cluster/kuberay/rayjob.yaml",
        "--for=create",
        f"{job}\n    kubectl logs",
    ]
    places = [TEXT.index(step) for step in [*steps, f"--pod-running-timeout=10m {job}"]]
    assert places == sorted(places), "the job is not there when the file is applied"
    assert f"edit raycluster {names['raycluster.yaml']}`" in TEXT
