"""The batch script under a real Slurm of two nodes, each with a network, a /tmp and processes of its own."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clusters import STARTED
from journeys import ROOT, Journey, newest_step, wait_until
from slurm_cluster import CPUS, Slurm, possible, slurm
from test_faults import check_whole, ready_journey, saved_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not possible(), reason="Slurm is not installed, or networks cannot be made here"),
]
SCRIPT = ROOT / "cluster" / "slurm" / "shear.sbatch"
OPTIONS = ("--gpus-per-node=0", f"--cpus-per-task={CPUS}")
ONE_A_NODE = "engine.cpus_per_worker=5"  # two do not fit


@dataclass(frozen=True)
class Checkout:
    """Where jobs are submitted: the sources' pipelines, and an environment in `.venv`."""

    slurm: Slurm
    folder: Path

    def submit(self, *words: str, options: tuple[str, ...] = ()) -> int:
        """The job's number."""
        return self.slurm.submit(*OPTIONS, *options, str(SCRIPT), *words, cwd=self.folder)

    def output(self, job: int) -> str:
        """What it has said."""
        file = self.folder / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def reach(self, job: int, journey: Journey, phase: str, step: int) -> None:
        """Wait for a step; AssertionError where the job ends before."""

        def reached() -> bool:
            assert self.slurm.job(job).state in ("PENDING", "RUNNING"), self.output(job)
            return newest_step(journey, phase) >= step

        wait_until(reached, f"step {step} of {phase}", 900, every_s=0.5)

    def lose_a_node(self, job: int) -> None:
        """The job's second node is gone at once, and comes back when the job waits for it."""
        lost = self.slurm.nodes[1]
        lost.host.end()
        wait_until(lambda: self.slurm.job(job).restarts == 1, "the job to be requeued", 180, every_s=1)
        self.slurm.start_node(lost)

    def check_nothing_left(self, job: int | None = None) -> None:
        """No process, no token and, where a job is named, nothing that its Rays wrote on the nodes."""
        wait_until(lambda: self.slurm.states() == ["idle", "idle"], "the nodes' release", 60, every_s=1)
        assert [node.processes() for node in self.slurm.nodes] == [{}, {}]
        assert not list(self.folder.glob(".shear-token-*")), "a token outlived its job"
        assert [node.name for node in self.slurm.nodes if node.temporary(f"ray-{job}").exists()] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    with slurm(2, tmp_path_factory.getbasetemp()) as cluster:
        yield Checkout(cluster, folder)


@pytest.mark.parametrize(
    ("words", "state", "status"), [(["--plan"], "COMPLETED", 0), (["pruning.stepps=3"], "FAILED", 2)],
    ids=["plan", "wrong recipe"],
)  # fmt: skip
def test_a_jobs_status_is_the_runs(checkout, words, state, status):
    """A cluster that does not come up under Slurm's own srun, a lost status, memory that others may take, leftovers."""
    job = checkout.submit(str(ROOT / "pipelines/recipes/quickstart.yaml"), *words)
    ended = checkout.slurm.end(job)
    assert (ended.state, ended.status) == (state, status), checkout.output(job)
    assert ("nothing is missing" in checkout.output(job)) == (status == 0)
    assert "mem=16000M" in checkout.slurm.say("scontrol", "show", "job", str(job)), "nodes are exclusive, memory is not"
    checkout.check_nothing_left(job)


def test_a_node_that_is_too_slow_for_ray_is_asked_again(checkout):
    """Ray ends a node whose agents take longer than 30 s to begin, as on a busy machine; the job ended with it."""
    job = checkout.submit(str(ROOT / "pipelines/recipes/quickstart.yaml"), "--plan")
    slow = checkout.slurm.nodes[1]
    agents = wait_until(lambda: slow.find("dashboard/agent.py"), "the second node's agent", every_s=0.1)
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)
    wait_until(
        lambda: "node2: Ray ended, attempt 1" in checkout.output(job), "Ray's end on that node", 120, every_s=0.5
    )
    for agent in slow.find("dashboard/agent.py"):
        os.kill(agent, signal.SIGCONT)
    ended = checkout.slurm.end(job)
    assert (ended.state, ended.status) == ("COMPLETED", 0), checkout.output(job)
    checkout.check_nothing_left(job)


def test_a_job_that_is_cancelled_or_loses_a_node_before_its_run_begins(checkout):
    """Catches a node lost that nobody notices, a start that trips over what the one before left, and leftovers."""
    job = checkout.submit(str(ROOT / "pipelines/recipes/quickstart.yaml"), "--plan")
    wait_until(lambda: STARTED in checkout.output(job), "the head", every_s=0.2)
    checkout.slurm.say("scancel", str(job))
    assert checkout.slurm.end(job).state == "CANCELLED"
    checkout.check_nothing_left()

    job = checkout.submit(str(ROOT / "pipelines/recipes/quickstart.yaml"), "--plan")
    wait_until(lambda: checkout.slurm.nodes[1].find("raylet"), "the second node", every_s=0.2)
    checkout.lose_a_node(job)
    ended = checkout.slurm.end(job)
    assert (ended.state, ended.status, ended.restarts) == ("COMPLETED", 0, 1), checkout.output(job)
    checkout.check_nothing_left()


def test_a_run_that_is_stopped_in_every_way_comes_to_its_end(checkout, finished_journey, tmp_path):
    """Catches a signal that Ray's nodes get instead of the run, a cancelled or requeued job that cannot go on, two
    workers that find each other by a loopback address, and leftovers."""
    finished, _ = finished_journey
    journey = ready_journey(finished, tmp_path / "again").with_overrides(ONE_A_NODE)

    job = checkout.submit(*journey.arguments)
    checkout.reach(job, journey, "pruning", 5)
    for node in checkout.slurm.nodes:
        assert node.find("ray::RayTrainWorker"), "both workers are on one node"
    checkout.slurm.say("scancel", "--signal=TERM", "--batch", str(job))
    check_stopped(checkout, job)
    assert saved_step(journey, "pruning") >= 5
    checkout.check_nothing_left(job)

    job = checkout.submit(*journey.arguments)
    checkout.reach(job, journey, "pruning", 17)
    checkout.slurm.say("scancel", str(job))
    assert checkout.slurm.end(job).state == "CANCELLED"
    checkout.check_nothing_left()

    job = checkout.submit(*journey.arguments)
    checkout.reach(job, journey, "recovery", 5)
    checkout.lose_a_node(job)
    ended = checkout.slurm.end(job)
    assert (ended.state, ended.status, ended.restarts) == ("COMPLETED", 0, 1), checkout.output(job)
    for phase in ("pruning", "recovery"):
        check_whole(journey, phase, finished)
    checkout.check_nothing_left()


def test_the_time_limit_leaves_a_checkpoint(checkout, finished_journey, tmp_path):
    """Catches a notice that Slurm does not send, or not to the run, and a stop that takes longer than it leaves."""
    journey = ready_journey(finished_journey[0], tmp_path / "long").with_overrides(ONE_A_NODE, "pruning.steps=5000")
    job = checkout.submit(*journey.arguments)
    checkout.reach(job, journey, "pruning", 5)
    told_at = minutes(checkout.slurm, job) + 1  # the notice comes five minutes before the limit
    checkout.slurm.say("scontrol", "update", f"JobId={job}", f"TimeLimit={told_at + 5}")
    check_stopped(checkout, job)
    assert saved_step(journey, "pruning") >= 5
    assert minutes(checkout.slurm, job) < told_at + 5
    checkout.check_nothing_left(job)


def check_stopped(checkout: Checkout, job: int) -> None:
    """The run was told, and not the nodes: it saved a checkpoint and said how to go on."""
    ended, said = checkout.slurm.end(job), checkout.output(job)
    assert (ended.state, ended.status) == ("FAILED", 143), said
    assert "saving a checkpoint first" in said
    assert "stopped by SIGTERM" in said
    assert "submit the same again" in said


def minutes(cluster: Slurm, job: int) -> int:
    """Whole minutes for which a job has run, or ran."""
    shown = cluster.say("scontrol", "show", "job", "-o", str(job))
    (ran,) = re.findall(r"RunTime=([\d:]+)", shown)
    hours, minute, _ = ran.split(":")
    return int(minute) + 60 * int(hours)
