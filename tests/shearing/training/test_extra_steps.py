"""A phase whose gates have not arrived at its last step goes on, within bounds, and can be resumed there."""

import pytest
from phase_runs import largest_difference, run_phase

from shearing.training.schedule import learning_rate

STEPS = 6


def phase_with(tiny_run, extra_steps, tolerance=0.01, **changed):
    gates = {"sparsity_warmup_steps": 3, "learning_rate": 0.3, "extra_steps": extra_steps, "tolerance": tolerance}
    return tiny_run.phase(pruning=True, training={"gates": gates, "evaluate_every_steps": 4} | changed)


def last_step(run):
    return run.of_kind("step")[-1]["step"]


@pytest.fixture(scope="module")
def whole(tiny_run, one_process, tmp_path_factory):
    """Ten extra steps that do not suffice, saved at the third of them."""
    folder = str(tmp_path_factory.mktemp("extra") / "checkpoint")
    return one_process.run(run_phase, phase_with(tiny_run, 10), save_after=9, folder=folder)[0], folder


class TestGoesOn:
    def test_to_its_bound_and_no_further(self, whole):
        # catches a phase that ends with gates between, and one that never ends
        run, _ = whole
        assert last_step(run) == STEPS + 10
        assert [row["step"] for row in run.of_kind("evaluation")] == [0, 4, 8, 12, 16]

    def test_says_why(self, whole):
        # catches steps that nobody asked for and nobody explains
        (event,) = [row for row in whole[0].of_kind("event") if row["event"] == "extra_steps"]
        assert event["step"] == STEPS
        assert "at most 10 steps with a rising penalty" in event["text"]
        assert "gates of 'hidden' are further than 0.01" in event["text"]

    def test_weights_stay_at_the_floor_of_their_schedule(self, whole, tiny_run):
        # catches a cosine that rises again, or stretches over the extra steps
        config = phase_with(tiny_run, 10).training
        rates = [row["learning_rate"] for row in whole[0].of_kind("step")]
        assert rates[:STEPS] == [learning_rate(config, step) for step in range(STEPS)]
        assert rates[STEPS:] == pytest.approx([0.1 * config.learning_rate] * 10)

    def test_a_fifth_more_by_default(self, tiny_run):
        # catches a bound of zero, or none
        assert phase_with(tiny_run, None).training.most_steps == STEPS + 2

    def test_resumes_inside(self, tiny_run, one_process, whole):
        # catches a resumed phase that is over at its regular end, or whose penalty begins again
        run, folder = whole
        rest = one_process.run(run_phase, phase_with(tiny_run, 10), resume=folder)[0]
        assert rest.history() == run.history(after=9)
        assert largest_difference(rest.gates, run.gates) == 0


@pytest.fixture(scope="module")
def arrived(tiny_run, one_process, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("arrived") / "checkpoint")
    phase = phase_with(tiny_run, 60, tolerance=0.2)
    run = one_process.run(run_phase, phase, save_after=STEPS, folder=folder)[0]
    return phase, run, folder


class TestStops:
    def test_as_soon_as_every_row_is_within_tolerance(self, arrived):
        # catches steps that only cost: the weights learn at the floor of their schedule there
        _, run, _ = arrived
        assert STEPS < last_step(run) < STEPS + 60
        gaps = [max(g["largest_layer_gap"] for g in row["sparsity"].values()) for row in run.of_kind("step")]
        assert gaps[-1] <= 0.2
        assert min(gaps[STEPS - 1 : -1]) > 0.2
        assert run.of_kind("evaluation")[-1]["step"] == last_step(run)

    def test_the_same_when_resumed_before(self, arrived, one_process):
        # catches an end that hangs on something that no checkpoint holds
        phase, run, folder = arrived
        rest = one_process.run(run_phase, phase, resume=folder)[0]
        assert rest.history() == run.history(after=STEPS)

    def test_at_the_regular_end_where_all_arrived(self, tiny_run, one_process):
        # catches extra steps that come whether they are needed or not
        run = one_process.run(run_phase, phase_with(tiny_run, 60, tolerance=2.0))[0]
        assert last_step(run) == STEPS
        assert not run.of_kind("event", after=STEPS - 1)
