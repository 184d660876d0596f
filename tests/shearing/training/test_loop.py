"""The loop against a plain one, and what stands between two batches."""

import math
from dataclasses import replace

import pytest
import torch
from phase_runs import BATCH_SEQUENCES, PROPORTIONS, PlannedMixture, Run, largest_difference, new_trainer, run_phase
from plain_reference import plain_run

from shearing.data.mixing import DomainExhausted
from shearing.training import loop
from shearing.training.loop import sequence_losses, training_reports
from shearing.training.watchdog import TrainingDivergedError

CLIPPED = {"steps": 5, "evaluate_every_steps": 100, "gradient_clip": 0.3, "weight_decay": 0.1}
GENTLE_GATES = {"gates": {"sparsity_warmup_steps": 3, "learning_rate": 0.1, "extra_steps": 0}}


def stopped_by(rank, world, phase, error, **kwargs):
    """The step and text of the error that ends a phase, on this rank."""
    trainer = new_trainer(rank, world, phase, **kwargs)
    try:
        for _ in training_reports(trainer):
            pass
    except error as raised:
        return trainer.state.step, str(raised)
    return None


class TestAgainstPlainTorch:
    @pytest.mark.parametrize("stage", [2, 3])
    def test_training_of_two_ranks(self, tiny_run, two_processes, stage):
        # catches gradients summed in place of averaged (norm and moments show it where Adam's steps do not), a clip or
        # weight decay that is not applied, a schedule off by one, micro-batches weighted wrongly
        phase = tiny_run.phase(stage=stage, training=CLIPPED)
        run = two_processes.run(run_phase, phase)[0]
        history, model, optimizer, _ = plain_run(phase)
        assert min(row["gradient_norm"] for row in history) > CLIPPED["gradient_clip"]
        self.check_reports(run, history, ("loss", "gradient_norm"))
        self.check_weights(run, model, optimizer)

    @pytest.mark.parametrize(("stage", "noise"), [(1, "shared"), (3, "shared"), (2, "per_rank")])
    def test_mask_learning_of_two_ranks(self, tiny_run, two_processes, stage, noise):
        # catches gate gradients of one rank or one micro-batch only, gates under the weights' clip, ranks that draw
        # other noise than they say, multipliers that descend
        gates = GENTLE_GATES["gates"] | {"noise": noise}
        phase = tiny_run.phase(pruning=True, stage=stage, training=CLIPPED | {"gates": gates})
        run = two_processes.run(run_phase, phase)[0]
        history, model, optimizer, plain = plain_run(phase, (None,) if noise == "shared" else (0, 1))
        self.check_reports(run, history, ("loss", "gradient_norm", "lagrangian", "gate_gradient_norm"))
        self.check_weights(run, model, optimizer)
        for name, log_alpha in plain.gates.log_alpha.items():
            torch.testing.assert_close(run.gates[f"gates:log_alpha.{name}"], log_alpha.detach(), atol=1e-5, rtol=1e-5)
            moment = plain.optimizers[0].state[log_alpha]["exp_avg"]
            torch.testing.assert_close(run.gates[f"optimizer:log_alpha.{name}/exp_avg"], moment, atol=1e-7, rtol=1e-4)
        for name, pair in plain.multipliers.items():
            for kind, multiplier in zip(("linear", "quadratic"), pair, strict=True):
                found = run.gates[f"lagrangian:{kind}.{name}"]
                torch.testing.assert_close(found, multiplier.detach(), atol=1e-5, rtol=1e-5)

    def check_reports(self, run, history, keys):
        reports = run.of_kind("step")
        assert [report["step"] for report in reports] == list(range(1, len(history) + 1))
        for report, expected in zip(reports, history, strict=True):
            assert {k: report[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, abs=1e-5, rel=1e-5)

    def check_weights(self, run, model, optimizer):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(run.tensors[name], parameter.detach(), atol=2e-5, rtol=1e-4)
            moment = optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(run.tensors[f"{name}::exp_avg"], moment, atol=1e-7, rtol=1e-3)

    def test_sequence_losses(self):
        # catches labels that are not the next token, and a loss taken in bfloat16
        torch.manual_seed(0)
        logits_BTV, tokens_BT = torch.randn(3, 7, 11).bfloat16(), torch.randint(0, 11, (3, 7))
        expected = [
            -sum(float(logits_BTV[b, t].double().log_softmax(0)[tokens_BT[b, t + 1]]) for t in range(6)) / 6
            for b in range(3)
        ]
        assert sequence_losses(logits_BTV, tokens_BT).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def runs(tiny_run, two_processes) -> list[Run]:
    """Eight steps of two ranks, whose proportions turn over after steps 3, 6 and 8."""
    only = {d: {e: float(e == d) for e in PROPORTIONS} for d in PROPORTIONS}
    phase = tiny_run.phase(training={"steps": 8, "evaluate_every_steps": 3})
    mixture = PlannedMixture({3: only["c"], 6: only["b"], 8: only["a"]})
    return two_processes.run(run_phase, phase, mixture=mixture)


class TestProportions:
    def test_change_holds_from_the_next_batch(self, runs):
        # catches a batch that was read ahead under the old proportions, on any rank
        for run in runs:
            late = {step: {draw.domain for draw in draws} for step, draws in run.draws.items() if step >= 3}
            owed = 1  # of a sequence a domain may still be owed from before
            assert all(sum(d.domain != "c" for d in run.draws[step]) <= owed for step in (3, 4, 5))
            assert late[5] == {"c"}
            assert late[7] == {"b"}

    def test_evaluation_report_names_the_new_proportions(self, runs):
        # catches a report written before the update
        evaluations = runs[0].of_kind("evaluation")
        assert [report["step"] for report in evaluations] == [0, 3, 6, 8]
        assert [report["version"] for report in evaluations] == [0, 1, 2, 3]
        assert [report["proportions"]["c"] for report in evaluations] == [PROPORTIONS["c"], 1.0, 0.0, 0.0]
        steps = runs[0].of_kind("step")
        assert [report["proportions"]["c"] for report in steps] == [0.2] * 3 + [1.0] * 3 + [0.0] * 2

    def test_nothing_is_read_that_is_not_used(self, runs):
        # catches reading ahead across an update (the rows would be dropped and read again) and past the last step
        for run in runs:
            asked = [draw for request in run.fetched for draw in request]
            assert asked == [draw for step in range(8) for draw in run.draws[step]]

    def test_ranks_share_every_batch(self, runs):
        # catches a sequence given to two ranks, or to none
        for step in range(8):
            draws = [draw for run in runs for draw in run.draws[step]]
            assert len(draws) == len(set(draws)) == BATCH_SEQUENCES
        drawn = runs[0].of_kind("step")[-1]["drawn"]
        counted = [draw.domain for run in runs for draws in run.draws.values() for draw in draws]
        assert drawn == {d: counted.count(d) for d in PROPORTIONS}

    def test_ranks_agree(self, runs):
        # catches losses or proportions that are one rank's own
        assert runs[0].history() == runs[1].history()


def test_reads_ahead_where_it_may(tiny_run, one_process):
    # catches a stream that always waits for its rows
    assert one_process.run(ahead_of_steps, tiny_run.phase())[0] == {0: [1], 1: [], 2: [3], 3: [], 4: [5], 5: []}


def ahead_of_steps(rank, world, phase):
    trainer, found = new_trainer(rank, world, phase), {}
    following = trainer.next_batch

    def next_batch():
        batch = following()
        found[trainer.state.step] = [plan.step for plan in trainer.stream.ahead]
        return batch

    trainer.next_batch = next_batch
    for _ in training_reports(trainer):
        pass
    return found


class TestEnds:
    def test_a_domain_that_runs_out_stops_every_rank(self, tiny_run, two_processes):
        # catches one rank raising alone (the others would hang), and a batch short of sequences
        phase = tiny_run.phase(
            mixture={"rule": "static", "on_exhausted": "stop"},
            proportions={"a": 0.9, "b": 0.1},
            references={"a": 2.0, "b": 2.0},
        )
        stops = two_processes.run(stopped_by, phase, DomainExhausted)
        assert stops[0] == stops[1]
        step, text = stops[0]
        assert step == 2  # 7.2 of 20 sequences a step: the third batch asks for more
        assert "domain a ran out at step 2" in text
        assert "on_exhausted=next_epoch" in text

    @pytest.mark.parametrize("pruning", [False, True])
    def test_divergence_names_the_knob(self, tiny_run, two_processes, pruning):
        # catches a run that goes on with weights that are no numbers
        phase = tiny_run.phase(pruning=pruning, training={"learning_rate": 1e30, "warmup_steps": 0})
        stops = two_processes.run(stopped_by, phase, TrainingDivergedError)
        assert stops[0] == stops[1]
        assert "learning_rate (now 1e+30)" in stops[0][1]


def test_text_that_is_trained_on_without_a_number_stops_the_phase(tiny_run, one_process):
    # catches a division by the proportions of the other domains, which add up to nothing
    (text,) = one_process.run(evaluated_without_numbers, tiny_run.phase())
    assert "the loss on held-out text is nan nats a token" in text


def evaluated_without_numbers(rank, world, phase):
    trainer, summed = new_trainer(rank, world, phase), loop.summed_losses
    mixture = trainer.state.mixture.model_copy(update={"proportions": {"a": 1.0, "b": 0.0, "c": 0.0}})
    trainer.state = replace(trainer.state, mixture=mixture)
    loop.summed_losses = lambda sums, device: summed(sums, device) | {"a": math.nan}
    try:
        trainer.evaluate(update=False)
    except TrainingDivergedError as error:
        return str(error)
    finally:
        loop.summed_losses = summed
    return None


def test_no_micro_batch_waits_for_the_device(tiny_run, one_process):
    # catches DeepSpeed's clock, which lets a GPU run dry before and after every micro-batch
    assert one_process.run(waits_for_the_device, tiny_run.phase()) == [0]


def waits_for_the_device(rank, world, phase):
    from deepspeed.accelerator import get_accelerator

    accelerator, waits = get_accelerator(), []
    accelerator.synchronize = lambda *_: waits.append(1)
    try:
        run_phase(rank, world, phase)
    finally:
        del accelerator.synchronize
    return len(waits)


def test_an_evaluation_changes_nothing(tiny_run, one_process):
    # catches evaluation that moves weights, gates, the random state, or leaves a module in the wrong mode
    often, never = ({"evaluate_every_steps": every, "steps": 4} for every in (1, 100))
    mixture = {"rule": "static"}
    runs = [
        one_process.run(run_phase, tiny_run.phase(pruning=True, training=training, mixture=mixture))[0]
        for training in (often, never)
    ]
    losses = [[report["loss"] for report in run.of_kind("step")] for run in runs]
    assert losses[0] == losses[1]
    assert largest_difference(runs[0].tensors, runs[1].tensors) == 0
    assert largest_difference(runs[0].gates, runs[1].gates) == 0
    assert runs[0].of_kind("evaluation")[-1]["losses"] == runs[1].of_kind("evaluation")[-1]["losses"]
