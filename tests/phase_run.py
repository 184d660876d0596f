"""One phase by a driver of its own, on the cluster that RAY_ADDRESS names, and quick to see room for more workers.

python tests/phase_run.py PHASE.json WORKSPACE
"""

import os
import sys
from pathlib import Path

from orchestrator.ray_session import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"})

import ray

from actors import training
from shearing.training.phase import PhaseConfig


def main(phase_file: str, workspace: str) -> None:
    training.LOOK_FOR_ROOM_EVERY_S = 2.0
    phase = PhaseConfig.model_validate_json(Path(phase_file).read_text())
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
    training.run_phase(phase, workspace, tell)
    ray.shutdown()


def tell(report: training.Report) -> None:
    if report["kind"] == "event":
        sys.stdout.write(f"{report['text']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
