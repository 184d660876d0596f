"""Phases that go nowhere are stopped within a few steps, with the reason, and leave no bad checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
from phase_runs import new_trainer, save_all

from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.config import WatchdogConfig
from shearing.training.loop import training_reports
from shearing.training.phase import restore
from shearing.training.watchdog import TrainingDivergedError, Watchdog


def seen(losses, **changed):
    """A watchdog that has seen these losses, and the step at which it raised (None where it did not)."""
    dog = Watchdog(WatchdogConfig(**changed))
    for step, loss in enumerate(losses):
        try:
            dog.see_loss(step, loss, 1.0, 1e-4)
        except TrainingDivergedError:
            return dog, step
    return dog, None


class TestLoss:
    def test_limit_by_hand(self):
        # catches a mean in place of a median: one outlier would move it
        dog, _ = seen([2.0, 2.2, 2.4, 4.9, 2.1], loss_ratio=2.0, loss_margin_nats=1.0)
        assert dog.limit == pytest.approx(2 * 2.2 + 1)

    def test_stops_after_so_many_bad_steps_in_a_row(self):
        # catches a stop at the first outlier, and a count that a good step between does not reset
        bad = 9.0
        assert seen([2.0] * 10 + [bad] * 4 + [2.0] + [bad] * 4)[1] is None
        assert seen([2.0] * 10 + [bad] * 9)[1] == 14

    def test_bad_losses_do_not_raise_the_limit(self):
        # catches an explosion that becomes the new normal
        assert seen([2.0, 9.0, 9.0, 9.0, 9.0])[0].limit == pytest.approx(5.0)

    def test_a_loss_that_rises_with_the_sparsity_is_no_explosion(self):
        # catches a run stopped for learning its masks: from 2 to 5 nats over 60 steps, and noise
        assert seen([2 + 3 * min(1, s / 60) + 0.3 * math.sin(9 * s) for s in range(300)])[1] is None

    @pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
    def test_what_is_no_number_stops_at_once(self, loss, norm):
        # catches a finite loss with a gradient that has just destroyed the weights
        with pytest.raises(TrainingDivergedError, match="step 7: the"):
            Watchdog(WatchdogConfig()).see_loss(7, loss, norm, 1e-4)

    def test_memory_survives_json(self):
        # catches a resumed phase that needs as many bad steps again
        dog, _ = seen([2.0] * 3 + [9.0] * 4)
        again = Watchdog(WatchdogConfig())
        again.load(json.loads(json.dumps(dog.to_json())))
        with pytest.raises(TrainingDivergedError, match=r"above 5\.000 for 5 steps in a row"):
            again.see_loss(7, 9.0, 1.0, 1e-4)


class TestGates:
    def group(self, *units):
        return {"head": {"size": 8, "target_units": 6.0, "expected_units": list(units)}}

    def test_names_group_layer_figures_and_knob(self):
        # catches a mean over layers that hides the one layer that is gone
        dog = Watchdog(WatchdogConfig(sparsity_steps=3))
        for step in range(2):
            dog.see_gates(step, [], self.group(6.0, 0.4, 8.0), 1.0)
        assert dog.suspicious
        with pytest.raises(TrainingDivergedError) as raised:
            dog.see_gates(2, [], self.group(6.0, 0.4, 8.0), 1.0)
        for part in ("'head' in layer 1", "0.4 of 8 units", "leaves 6", "pruning.gates.learning_rate (now 1)"):
            assert part in str(raised.value)

    def test_an_overshoot_that_comes_back_is_no_collapse(self):
        # catches counts that are not of steps in a row
        dog = Watchdog(WatchdogConfig(sparsity_steps=3))
        for step in range(12):
            dog.see_gates(step, [], self.group(0.4 if step % 3 else 6.0), 1.0)
        dog.see_gates(12, [], self.group(6.0), 1.0)
        assert not dog.suspicious

    def test_gates_that_are_no_numbers(self):
        with pytest.raises(TrainingDivergedError, match=r"log_alpha\.head"):
            Watchdog(WatchdogConfig()).see_gates(3, ["log_alpha.head"], {}, 1.0)


def drive(rank, world, phase, folder, spoil=None):
    """Run a phase that saves when it wants to. Returns where and why it stopped, and the steps saved."""
    trainer, saved = new_trainer(rank, world, phase), []
    try:
        for report in training_reports(trainer):
            if spoil and report["kind"] == "step":
                spoil(trainer, report["step"])
            if trainer.settled(report) and trainer.checkpoint_due():
                save_all(trainer, f"{folder}/{report['step']}")
                saved.append(report["step"])
    except TrainingDivergedError as error:
        return trainer.state.step, str(error), saved
    return trainer.state.step, "", saved


def losses_of(rank, world, phase, folder):
    """Held-out losses of a checkpoint."""
    trainer = new_trainer(rank, world, phase)
    restore(trainer, CheckpointReader(open_store(folder)))
    return trainer.evaluate(update=False)["losses"]


def spoil_gates(trainer, step):
    if step == 3:
        with torch.no_grad():
            trainer.learner.gates.log_alpha["head"][1, 0] = math.nan


def close_layer(trainer, _step):
    with torch.no_grad():
        trainer.learner.gates.log_alpha["intermediate"][2] = -4.0


def explode(trainer, step):
    """From step 4 on weights move so far that nothing is left of the model, but stay finite."""
    if step == 4:
        object.__setattr__(trainer.config, "learning_rate", 3.0)


class TestPhases:
    def run(self, group, phase, tmp_path, **kwargs):
        folder = tmp_path / "checkpoints"
        stops = group.run(drive, phase, str(folder), **kwargs)
        assert all(stop == stops[0] for stop in stops)
        kept = sorted(
            int(path.name) for path in folder.glob("*") if path.name.isdigit() and (path / "index.json").exists()
        )
        assert kept == stops[0][2]
        return stops[0]

    @pytest.mark.parametrize("pruning", [False, True])
    def test_an_exploding_loss(self, tiny_run, two_processes, tmp_path, pruning):
        # catches a run that burns its budget, ranks that stop apart (the others would hang), and a checkpoint of
        # weights that are lost already
        training = {"steps": 40, "warmup_steps": 0, "checkpoint_every_steps": 1, "evaluate_every_steps": 100}
        phase = tiny_run.phase(pruning=pruning, training=training)
        step, text, saved = self.run(two_processes, phase, tmp_path, spoil=explode)
        assert 4 <= step <= 12
        assert "Lower learning_rate (now 3)" in text
        assert saved
        assert saved[-1] <= 5
        losses = two_processes.run(losses_of, phase, str(tmp_path / f"checkpoints/{saved[-1]}"))[0]
        assert max(losses.values()) < 6  # log of the vocabulary is 4.6

    def test_weights_lost_at_once(self, tiny_run, one_process, tmp_path):
        # catches the checkpoint of a step whose loss was fine and whose update was not
        training = {"learning_rate": 1e30, "warmup_steps": 0, "checkpoint_every_steps": 1, "evaluate_every_steps": 100}
        step, text, saved = self.run(one_process, tiny_run.phase(training=training), tmp_path)
        assert (step, saved) == (1, [])
        assert "loss on held-out text is" in text

    def test_gates_that_are_no_numbers(self, tiny_run, one_process, tmp_path):
        # catches NaN that goes on into weights and checkpoints
        phase = tiny_run.phase(pruning=True, training={"checkpoint_every_steps": 2, "evaluate_every_steps": 100})
        step, text, saved = self.run(one_process, phase, tmp_path, spoil=spoil_gates)
        assert step == 3
        assert saved == [2]
        assert "loss is nan" in text or "log_alpha.head" in text

    def test_a_layer_that_closes_for_good(self, tiny_run, one_process, tmp_path):
        # catches collapse that the mean over layers hides, and a checkpoint taken while it goes on
        training = {"steps": 40, "checkpoint_every_steps": 1, "evaluate_every_steps": 100}
        watchdog = {"sparsity_steps": 10, "least_kept_share": 0.25}
        phase = tiny_run.phase(pruning=True, training=training, watchdog=watchdog)
        step, text, saved = self.run(one_process, phase, tmp_path, spoil=close_layer)
        assert step == 10  # closed after the first; ten steps in a row say so
        assert "'intermediate' in layer 2" in text
        assert saved == [1]

    def test_a_learning_rate_of_gates_that_throws_everything_away(self, tiny_run, one_process, tmp_path):
        # catches gates that learn at an absurd rate, with real steps only
        gates = {"sparsity_warmup_steps": 3, "learning_rate": 40.0, "extra_steps": 0}
        phase = tiny_run.phase(
            pruning=True,
            training={"steps": 40, "gates": gates},
            watchdog={"sparsity_steps": 3, "least_kept_share": 0.25},
        )
        step, text, _ = self.run(one_process, phase, tmp_path)
        assert step < 25
        assert "pruning.gates.learning_rate (now 40)" in text

    def test_nothing_stops_a_good_run(self, tiny_run, one_process, tmp_path):
        step, text, saved = self.run(one_process, tiny_run.phase(pruning=True), tmp_path)
        assert (step, text, saved) == (6, "", [6])
        assert Path(tmp_path / "checkpoints/6/state.json").exists()
