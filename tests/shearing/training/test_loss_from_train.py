"""The mixture moved by what training batches said: exact on any number of ranks, and through an interruption."""

import json

import pytest
from phase_runs import PROPORTIONS, REFERENCES, largest_difference, run_phase

from shearing.data.config import MixtureConfig
from shearing.data.mixture import MixtureState, next_state

EVERY, SAVED_AFTER = 3, 4  # saved between two updates: one step of the next is gathered already


def phase_of(tiny_run, **changed):
    mixture = {"rule": "sheared_unclipped", "loss_from": "train"}
    training = {"steps": 8, "evaluate_every_steps": 8, "update_mixture_every_steps": EVERY}
    return tiny_run.phase(**{"mixture": mixture, "training": training} | changed)


@pytest.fixture(scope="module")
def whole(tiny_run, two_processes, tmp_path_factory):
    """Two ranks with two micro-batches a step each, and the checkpoint they left on the way."""
    folder = str(tmp_path_factory.mktemp("gathered") / "checkpoint")
    return two_processes.run(run_phase, phase_of(tiny_run), save_after=SAVED_AFTER, folder=folder), folder


def test_updates_come_from_the_steps_reports(whole):
    """Decided again from what each step reported and drew. Catches one rank's or one micro-batch's losses, means of
    means, and sums that run on over an update."""
    run = whole[0][0]
    steps, updates = run.of_kind("step"), run.of_kind("mixture")
    assert [report["step"] for report in updates] == [3, 6]
    assert [report["step"] for report in run.of_kind("evaluation")] == [0, 8]
    drawn, state = dict.fromkeys(PROPORTIONS, 0), MixtureState(version=0, step=0, proportions=PROPORTIONS)
    for update in updates:
        nats, count = dict.fromkeys(PROPORTIONS, 0.0), dict.fromkeys(PROPORTIONS, 0)
        for step in steps[update["step"] - EVERY : update["step"]]:
            new = {d: step["drawn"][d] - drawn[d] for d in PROPORTIONS}
            drawn = step["drawn"]
            for domain, loss in step["losses"].items():
                nats[domain] += loss * new[domain]
                count[domain] += new[domain]
        losses = {d: nats[d] / count[d] for d in PROPORTIONS}
        assert update["sequences"] == count
        assert update["losses"] == pytest.approx(losses, abs=1e-9)
        config = MixtureConfig(rule="sheared_unclipped")
        state = next_state(state, losses, REFERENCES, config, PROPORTIONS, step=update["step"])
        assert update["proportions"] == pytest.approx(state.proportions, abs=1e-9)
        assert update["version"] == state.version
    held = {step["step"]: step["proportions"] for step in steps}
    assert held[3] == PROPORTIONS
    assert held[4] == held[6] == updates[0]["proportions"]
    assert held[7] == updates[1]["proportions"] == run.of_kind("evaluation")[-1]["proportions"]


def test_one_process_decides_as_two_do(tiny_run, one_process, whole):
    """Catches shares that are added up over ranks which hold the sums of all already."""
    alone = one_process.run(run_phase, phase_of(tiny_run))[0]
    for mine, others in zip(alone.of_kind("mixture"), whole[0][0].of_kind("mixture"), strict=True):
        assert mine["sequences"] == others["sequences"]
        assert mine["losses"] == pytest.approx(others["losses"], abs=1e-5)
        assert mine["proportions"] == pytest.approx(others["proportions"], abs=1e-5)
    assert whole[0][0].history() == whole[0][1].history()


def test_resumed_between_updates_it_decides_the_same(tiny_run, one_process, two_processes, whole):
    """Catches sums since the last update that die with the workers, or are counted by every rank that resumes."""
    runs, folder = whole
    with open(f"{folder}/state.json") as file:
        assert sum(count for _, count in json.load(file)["gathered"].values()) == 8
    rest = two_processes.run(run_phase, phase_of(tiny_run), resume=folder)
    assert rest[0].history() == runs[0].history(after=SAVED_AFTER)
    assert largest_difference(rest[0].tensors, runs[0].tensors) == 0
    alone = one_process.run(run_phase, phase_of(tiny_run, stage=3), resume=folder)[0]
    for mine, others in zip(alone.of_kind("mixture"), runs[0].of_kind("mixture", after=SAVED_AFTER), strict=True):
        assert mine["sequences"] == others["sequences"]
        assert mine["proportions"] == pytest.approx(others["proportions"], abs=1e-5)


def test_a_domain_that_was_not_read_keeps_its_proportion(tiny_run, one_process):
    """Catches a division by no sequences, and a loss of 0 that would empty the domain."""
    proportions = {"a": 0.59, "b": 0.4, "c": 0.01}
    training = {"steps": 2, "update_mixture_every_steps": 1, "evaluate_every_steps": 2}
    run = one_process.run(run_phase, phase_of(tiny_run, proportions=proportions, training=training))[0]
    for update in run.of_kind("mixture"):
        assert "c" not in update["sequences"]
        assert update["losses"]["c"] is None
        assert update["proportions"]["c"] == 0.01
    assert run.of_kind("mixture")[0]["proportions"]["a"] != pytest.approx(0.59, abs=1e-4)


def test_in_mask_learning_too(tiny_run, one_process):
    """Catches a cadence of the mixture that mask learning does not keep."""
    phase = phase_of(tiny_run, pruning=True)
    run = one_process.run(run_phase, phase)[0]
    assert [report["step"] for report in run.of_kind("mixture")] == [3, 6]
