"""One phase on a cluster of real raylets that loses a node and gets another; run as a script by test_elastic.py.

python tests/elastic_run.py PHASE.json WORKSPACE
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.ray_session import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"})

import ray
from ray.cluster_utils import Cluster

from actors import training
from shearing.training.phase import PhaseConfig

CPUS_OF_A_NODE = 1
LOST_AT, BACK_AT = 20, 60


def newest_step(metrics: Path) -> int:
    """The newest step in a phase's metrics."""
    if not metrics.exists():
        return 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((row["step"] for row in rows), default=0)


def main(phase_file: str, workspace: str) -> None:
    """Run the phase in a thread; the nodes come and go by the main one, which alone may start them."""
    phase = PhaseConfig.model_validate_json(Path(phase_file).read_text())
    metrics = Path(workspace) / "metrics" / f"{phase.name}.jsonl"
    training.LOOK_FOR_ROOM_EVERY_S = 2.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_OF_A_NODE})
    node = cluster.add_node(num_cpus=CPUS_OF_A_NODE)
    try:
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(training.run_phase, phase, workspace, lambda _report: None)

            def wait_for(step: int) -> None:
                while newest_step(metrics) < step and not running.done():
                    time.sleep(0.05)

            wait_for(LOST_AT)
            cluster.remove_node(node, allow_graceful=False)
            wait_for(BACK_AT)
            cluster.add_node(num_cpus=CPUS_OF_A_NODE)
            running.result()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
