"""A phase that asks for more than there is makes nodes come, trains on them, and lets them go.

By Ray's own autoscaler over its provider of nodes on this machine, which starts real raylets.
"""

import json
import os
import subprocess
import sys

import psutil
import pytest
import ray
from clusters import Head, started_head
from journeys import ROOT, Journey, check_data_account, end_with_children, free_ports, newest_step, wait_until
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
            "head_start_ray_commands", "worker_start_ray_commands")  # fmt: skip
STEPS, BATCH_SEQUENCES, IDLE_MINUTES = 200, 8, 1


def autoscaling(port: int) -> dict:
    """A head of one CPU, and up to two nodes of one CPU each when something asks for them."""
    address = f"{ray.util.get_node_ip_address()}:{port}"
    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "on-this-machine",
        "provider": {
            "type": "external",  # by its own name, Ray looks for defaults that are not in its package
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        **{name: [] for name in COMMANDS},
        "file_mounts": {},
        "cluster_synced_files": [],
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
    }


@pytest.fixture
def head(tmp_path):
    (port,) = free_ports(1)
    (tmp_path / "autoscaling.json").write_text(json.dumps(autoscaling(port)))
    options = (f"--autoscaling-config={tmp_path}/autoscaling.json", "--include-dashboard=false")
    words = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with started_head(tmp_path / "head.log", 1, *options, port=port, **words) as started:
        yield started


def nodes(head: Head) -> int:
    """Raylets of the cluster that are alive."""
    count = 0
    for process in psutil.process_iter():
        try:
            count += process.name() == "raylet" and any(head.folder in word for word in process.cmdline())
        except psutil.Error:
            continue
    return count


def run(head: Head, phase: dict, folder) -> tuple[Journey, int]:
    """A whole phase on the cluster; how many nodes there were at most while it trained."""
    journey, most = Journey(folder, []), 0
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(phase))
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/phase_run.py"), str(file), str(folder)],
        env=head.words | {"RAY_ADDRESS": head.address, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:

        def ended() -> bool:
            nonlocal most
            if newest_step(journey, phase["name"]):
                most = max(most, nodes(head))
            return driver.poll() is not None

        wait_until(ended, "the phase", timeout_s=900, every_s=1)
        assert driver.returncode == 0, driver.communicate()[1][-3000:]
    finally:
        end_with_children(driver)
    return journey, most


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_come_when_a_phase_asks_for_more_and_go_after_it(head, pruning_phase, tmp_path):
    """Catches elastic workers for which no node ever comes, since nobody asks for more than there is; a fixed number
    that gives up before its nodes are there; and a request that outlives its phase, so that idle nodes are paid."""
    assert nodes(head) == 1
    values = pruning_phase.model_dump(mode="json")
    values["engine"] |= {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.8}
    values["training"]["steps"] = STEPS
    journey, most = run(head, values, tmp_path / "elastic")
    starts = [row for row in journey.rows("pruning") if row["kind"] == "event" and row["event"] == "resumed"]
    assert [row["text"].rpartition("with ")[2] for row in starts] == ["2 workers"]
    assert most == 2
    check_data_account(journey.rows("pruning"), STEPS, BATCH_SEQUENCES, journey.checkpoints("pruning")[-1])
    wait_until(lambda: nodes(head) == 1, "the idle node's end", timeout_s=600)

    values["engine"] |= {"workers": 3}
    values["training"]["steps"] = 24
    journey, most = run(head, values, tmp_path / "fixed")
    assert most == 3
    assert all("-of-3-" in checkpoint.name for checkpoint in journey.checkpoints("pruning"))
    check_data_account(journey.rows("pruning"), 24, BATCH_SEQUENCES, journey.checkpoints("pruning")[-1])
    wait_until(lambda: nodes(head) == 1, "the idle nodes' end", timeout_s=600)
