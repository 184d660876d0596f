"""Machines at hand: the launcher's file for them and the same by hand, run between machines that ssh alone joins."""

import json
import os
import re

import pytest
import yaml
from journeys import ROOT, check_data_account, small_journey, wait_until
from machines import machines, possible

WORDS = "export RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:8265;"
CONFIG = "/shared/local.yaml"
STEPS, BATCH_SEQUENCES = 24, 8  # of the small run's phases
LOST_S = 240  # a worker's Ray looks for its head for a minute, and its agents for one more


def write_config(head, workers):
    """cluster/launcher/local.yaml with these machines' addresses, and without containers, which they cannot run."""
    config = yaml.safe_load((ROOT / "cluster" / "launcher" / "local.yaml").read_text())
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    del config["docker"]
    (head.shared / "local.yaml").write_text(yaml.safe_dump(config))


def addresses(desk):
    """Of the nodes that the cluster has, as one sees them who submits jobs."""
    done = desk.run(f"{WORDS} ray list nodes --format json --filter state=ALIVE")
    return sorted(node["node_ip"] for node in json.loads(done.stdout)) if done.returncode == 0 else []


def wait_for_all(desk, nodes):
    wait_until(lambda: addresses(desk) == sorted(node.address for node in nodes), "all nodes to join", every_s=2)


def submit(desk, log):
    """The small run as cluster/README.md submits one. A worker takes more than half of a machine's cores."""
    words = ("/shared/small/small.yaml", "workspace=/shared/runs/x", "corpus.path=/shared/corpora",
             "corpus.root=/shared/text", f"engine.cpus_per_worker={0.75 * os.cpu_count()}")  # fmt: skip
    command = f"ray job submit --working-dir . -- python pipelines/shear.py {' '.join(words)}"
    return desk.start(f"{WORDS} {command}", log)


def check_succeeded(desk, log, submitted):
    assert submitted.wait(timeout=900) == 0, log.read_text()
    listed = desk.does(f"{WORDS} ray job list")
    assert listed.count("<JobStatus.SUCCEEDED") == listed.count("JobDetails(") == 1, listed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not possible(), reason="machines cannot be made here (root, `ip`, sshd and rsync are needed)")
def test_machines_at_hand(tmp_path):
    """Catches a launcher's file that is valid and starts no cluster: a node that does not join, a token that is left
    behind, readable by all or not asked for, workers of one thread each, whatever cores they have, a job that finds no
    `python`, and a Ray that outlives `ray down`."""
    with machines(4, tmp_path) as (head, *workers, desk):
        write_config(head, workers)
        small_journey(head.shared / "small", shared=head.shared)
        desk.does("ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
        desk.does(f"RAY_UP_enable_autoscaler_v2=0 ray up --yes {CONFIG}")
        desk.start(f"ray dashboard {CONFIG}", tmp_path / "dashboard.log")
        wait_for_all(desk, [head, *workers])
        modes = [machine.does("stat --format=%a ~/.ray/auth_token").strip() for machine in (head, *workers, desk)]
        assert modes == ["600"] * 4
        for node in (head, *workers):
            assert all("OMP_NUM_THREADS" not in raylet.environ() for raylet in node.running("raylet/raylet "))
        stranger = desk.run(f"{WORDS} RAY_AUTH_TOKEN={'0' * 64} ray job list")
        assert stranger.returncode != 0
        assert "token" in stranger.stdout + stranger.stderr

        log = tmp_path / "job.log"
        job = submit(desk, log)

        def at_work():
            assert job.poll() is None, log.read_text()
            return [node for node in (head, *workers) if node.running("RayTrainWorker")]

        wait_until(lambda: len(at_work()) == 2, "workers on two machines", every_s=0.5)
        check_succeeded(desk, log, job)
        assert "joining the Ray cluster at" in log.read_text()
        for phase in ("pruning", "recovery"):
            rows = [json.loads(row) for row in (head.shared / f"runs/x/metrics/{phase}.jsonl").read_text().splitlines()]
            newest = max((head.shared / "runs/x/checkpoints" / phase).glob("step-*"))
            check_data_account(rows, STEPS, BATCH_SEQUENCES, newest)

        desk.does(f"ray down --yes {CONFIG}")
        assert not head.running("gcs_server")
        wait_until(
            lambda: not any(worker.running("ray::") for worker in workers),
            "the workers to miss their head",
            LOST_S,
            every_s=1,
        )
        for worker in workers:
            worker.does("ray stop")
        for forwarding in desk.running("ssh -tt -L"):
            forwarding.kill()
        by_hand(head, workers, desk, tmp_path)


def by_hand(head, workers, desk, folder):
    """What cluster/README.md tells for machines without docker; the run that is done is found done."""
    head.does("rm -r ~/.ray && ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    for other in (*workers, desk):
        token = head.does("cat ~/.ray/auth_token")
        other.does(f"umask 077 && mkdir -p ~/.ray && echo -n {token} >~/.ray/auth_token")
    head.does("export RAY_AUTH_MODE=token; ray start --head --dashboard-host 127.0.0.1")
    for worker in workers:
        worker.does(f"export RAY_AUTH_MODE=token; ray start --address {head.address}:6379")
    ssh = f"ssh -o StrictHostKeyChecking=no -N -L 8265:127.0.0.1:8265 {head.address}"
    desk.start(ssh, folder / "forward.log")
    wait_for_all(desk, [head, *workers])
    log = folder / "again.log"
    check_succeeded(desk, log, submit(desk, log))
    stages = set(re.findall(r"^\[\d+/(\d+)\] ", log.read_text(), flags=re.MULTILINE))
    assert stages == {str(log.read_text().count("finished already"))}
