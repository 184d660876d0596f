"""One phase on a cluster of real raylets whose nodes come and go; run as a script by test_elastic.py.

python tests/elastic_run.py PHASE.json WORKSPACE EVENT ...

An event is `gain:STEP`, a node of one CPU that joins at that step; `lose:STEP`, the last node with all its processes
killed at once; `lose:STEP:saving` and `lose:STEP:evaluating`, the same at the first moment from that step on at which a
checkpoint is half written, or the losses of an evaluation are being collected. With `hold:CPUS` as the first one,
another job holds so much of the last node's CPU from before the phase begins.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import psutil
from faults import evaluating, incomplete, is_titled
from journeys import ROOT, Journey, end_with_children, newest_step
from ray.cluster_utils import Cluster

CPUS_OF_A_NODE = 1
HOLDER = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)
hold = ray.remote(lambda: time.sleep(10**6)).options(num_cpus=float(sys.argv[3]), scheduling_strategy=node).remote()
while ray.available_resources()["CPU"] > 2 - float(sys.argv[3]):
    time.sleep(0.1)
print("holds", flush=True)
ray.get(hold)
"""
SLICE_S, LOOKED_AT_S, HELD_STILL_S = 0.004, 0.02, 0.2


class ElasticRun:
    """A phase's driver and the nodes that it runs on, of which the head is never lost."""

    def __init__(self, phase_file: str, workspace: str, held_cpus: str | None) -> None:
        self.phase: str = json.loads(Path(phase_file).read_text())["name"]
        self.journey = Journey(Path(workspace), [])
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": CPUS_OF_A_NODE, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=CPUS_OF_A_NODE)]
        self.others = [] if held_cpus is None else [self._hold(held_cpus)]
        script = [sys.executable, str(ROOT / "tests" / "phase_run.py"), phase_file, workspace]
        self.driver = subprocess.Popen(script, env=os.environ | {"RAY_ADDRESS": self.cluster.address})

    def _hold(self, cpus: str) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLDER, self.cluster.address, self.nodes[-1].node_id, cpus]
        holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        return holder

    def bring_about(self, event: str) -> None:
        kind, step, *moment = event.split(":")
        while newest_step(self.journey, self.phase) < int(step):
            assert self.driver.poll() is None, f"the phase ended before {event}"
            time.sleep(0.03)
        if kind == "gain":
            self.nodes.append(self.cluster.add_node(num_cpus=CPUS_OF_A_NODE))
        else:
            self._lose(moment[0] if moment else "")

    def _lose(self, moment: str) -> None:
        node = self.nodes.pop()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        tree = [raylet, *raylet.children(recursive=True)]
        (worker,) = (each for each in tree if is_titled(each, "RayTrainWorker"))
        while moment and not self._caught(moment, worker):
            assert self.driver.poll() is None, f"the phase ended before it was caught {moment}"
        for each in tree:
            each.send_signal(signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def _caught(self, moment: str, worker: psutil.Process) -> bool:
        """Whether the worker now stands still in the middle of it; goes on for a moment where it does not.

        What it takes from the other worker's doings to its own end is milliseconds long. So it runs in slices that are
        shorter than that, and stands still between them for as long as the other needs to show where it is.
        """

        def holds() -> bool:
            if moment == "saving":
                return incomplete(self.journey.workspace / "checkpoints" / self.phase)
            return evaluating(self.journey, self.phase)

        worker.send_signal(signal.SIGSTOP)
        time.sleep(LOOKED_AT_S)
        if holds():
            time.sleep(HELD_STILL_S)
            if holds():
                return True
        worker.send_signal(signal.SIGCONT)
        time.sleep(SLICE_S)
        return False


def main(phase_file: str, workspace: str, *events: str) -> int:
    held = [event.removeprefix("hold:") for event in events if event.startswith("hold:")]
    run = ElasticRun(phase_file, workspace, held[0] if held else None)
    try:
        for event in events[len(held) :]:
            run.bring_about(event)
        return run.driver.wait()
    finally:
        for process in (run.driver, *run.others):
            end_with_children(process)
        run.cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
