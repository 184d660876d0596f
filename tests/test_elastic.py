"""Workers that come and go with their nodes, on real raylets: nothing is lost or read twice, whatever their number."""

import json
import subprocess
import sys

import pytest
from journeys import ROOT, Journey, check_data_account, environment
from test_faults import REARRANGED, check_resumed, check_whole

STEPS, BATCH_SEQUENCES = 300, 8
ONE_OR_TWO = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.8}  # nodes have one CPU


def run_on_nodes(values: dict, folder, *events: str) -> tuple[Journey, str]:
    """A phase on two nodes, with what `events` bring about there, and what its driver was told."""
    (folder / "phase.json").write_text(json.dumps(values))
    journey = Journey(folder / "run", [])
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/elastic_run.py"),
            str(folder / "phase.json"),
            str(journey.workspace),
            *events,
        ],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/chaos"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return journey, done.stdout


def starts(journey: Journey, phase: str) -> list[dict]:
    return [row for row in journey.rows(phase) if row["kind"] == "event" and row["event"] == "resumed"]


@pytest.mark.slow
def test_fewer_workers_when_a_node_goes_and_more_when_one_comes(pruning_phase, tmp_path):
    """Catches a phase that waits for the node it lost, that never grows again, that loses what it did since the last
    checkpoint when it grows, and a batch or a schedule that depends on how many workers there are."""
    values = pruning_phase.model_dump(mode="json")
    # passes of three sequences: one worker makes three of them for a batch of eight, two make two each
    values["engine"] |= ONE_OR_TWO | {"micro_batch_sequences": 3}
    values["training"]["steps"] = STEPS
    journey, _ = run_on_nodes(values, tmp_path, "lose:20", "gain:60")
    rows, (shrunk, grown) = journey.rows("pruning"), starts(journey, "pruning")
    assert [row["text"].rpartition("with ")[2] for row in (shrunk, grown)] == ["1 worker", "2 workers"]
    before = max(row["step"] for row in rows[: rows.index(grown)] if row["kind"] == "step")
    assert grown["step"] == before, "growing lost steps"
    check_data_account(rows, STEPS, BATCH_SEQUENCES, journey.checkpoints("pruning")[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "event"), [("recovery", "lose:9:evaluating"), ("pruning", "lose:9:saving")])
def test_a_node_lost_at_a_bad_moment(request, finished_journey, tmp_path, phase, event):
    """Catches an evaluation that waits for a rank that is gone, or counts its share twice, and a checkpoint gone on
    from though a node took a part of it along."""
    values = request.getfixturevalue(f"{phase}_phase").model_dump(mode="json")
    values["engine"] |= ONE_OR_TWO
    journey, _ = run_on_nodes(values, tmp_path, event)
    check_resumed(journey, phase, 1)
    assert starts(journey, phase)[0]["text"] == "goes on from step 8 with 1 worker"
    check_whole(journey, phase, finished_journey[0], REARRANGED)


@pytest.mark.slow
def test_what_another_job_holds_is_left_to_it(recovery_phase, finished_journey, tmp_path):
    """Catches a phase that is tried for ever in the size for which it would need what another job holds of a node."""
    values = recovery_phase.model_dump(mode="json")
    values["engine"] |= ONE_OR_TWO
    journey, told = run_on_nodes(values, tmp_path, "hold:0.5")
    assert "the workers could not start: others use what was counted on, or it was lost. Trying at most 1\n" in told
    assert [row["workers"] for row in journey.rows("recovery") if row["kind"] == "start"] == [1]
    check_whole(journey, "recovery", finished_journey[0], REARRANGED)
