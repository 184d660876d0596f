"""A phase over hosts with addresses of their own, whose network fails for a while or for good."""

import json
import sys
import time

import pytest
from hosts import allowed, network
from journeys import ROOT, Journey, newest_step, wait_until
from test_faults import REARRANGED, check_resumed, check_whole

BLINK_S = 5.0
PORT = 6379


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not allowed(), reason="networks cannot be made here (root and `ip` are needed)")
def test_a_host_cut_off_for_a_while_and_for_good(finished_journey, pruning_phase, tmp_path):
    """Catches workers that only find each other by a loopback address, a pause of the network that costs steps, a group
    that waits for ever for a host that no longer answers, and one that is cut off and still writes."""
    values = pruning_phase.model_dump(mode="json")
    values["engine"] |= {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.8}
    (tmp_path / "phase.json").write_text(json.dumps(values))
    journey, log = Journey(tmp_path / "run", []), tmp_path / "driver.log"
    with network(2) as (head, other):
        head.start_ray(tmp_path / "head.log", "--head", f"--port={PORT}", "--include-dashboard=false")
        other.start_ray(tmp_path / "other.log", f"--address={head.address}:{PORT}")
        driver = head.start(
            sys.executable, str(ROOT / "tests/phase_run.py"), str(tmp_path / "phase.json"), str(journey.workspace),
            log=log, RAY_ADDRESS=f"{head.address}:{PORT}",
        )  # fmt: skip

        def reached(step: int) -> bool:
            assert driver.poll() is None, log.read_text()
            return newest_step(journey, "pruning") >= step

        wait_until(lambda: reached(5), "step 5")
        other.cut_off()
        time.sleep(BLINK_S)
        other.join()
        wait_until(lambda: reached(9), "step 9")
        check_resumed(journey, "pruning", 0)
        other.cut_off()
        assert driver.wait(timeout=900) == 0, log.read_text()
    check_resumed(journey, "pruning", 1)
    check_whole(journey, "pruning", finished_journey[0], REARRANGED)
