"""Workers that come and go with their nodes, on real raylets: nothing is lost or read twice, whatever their number."""

import json
import subprocess
import sys

import pytest
from journeys import ROOT, Journey, check_data_account, environment

STEPS, BATCH_SEQUENCES = 300, 8


@pytest.mark.slow
def test_fewer_workers_when_a_node_goes_and_more_when_one_comes(pruning_phase, tmp_path):
    """Catches a phase that waits for the node it lost, that never grows again, that loses what it did since the last
    checkpoint when it grows, and a batch or a schedule that depends on how many workers there are."""
    # passes of three sequences: one worker makes three of them for a batch of eight, two make two each
    engine = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.8, "micro_batch_sequences": 3}
    values = pruning_phase.model_dump(mode="json")
    values["engine"] |= engine
    values["training"]["steps"] = STEPS
    (tmp_path / "phase.json").write_text(json.dumps(values))
    journey = Journey(tmp_path / "run", [])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "elastic_run.py"), str(tmp_path / "phase.json"), str(journey.workspace)],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = journey.rows("pruning")
    starts = [row for row in rows if row["kind"] == "event" and row["event"] == "resumed"]
    assert [row["text"].rpartition("with ")[2] for row in starts] == ["1 worker", "2 workers"]
    grown = rows.index(starts[1])
    before = max(row["step"] for row in rows[:grown] if row["kind"] == "step")
    assert starts[1]["step"] == before, "growing lost steps"
    check_data_account(rows, STEPS, BATCH_SEQUENCES, journey.checkpoints("pruning")[-1])
