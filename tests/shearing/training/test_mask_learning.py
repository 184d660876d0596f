"""Gates beside the engine. That they learn as in one process is shown in test_loop, that they resume in test_phase."""

import pytest
import torch
from phase_runs import TARGET, largest_difference, new_trainer

from shearing.models.family import family_of, shape_of
from shearing.models.loading import load_model, read_config
from shearing.models.shape import TargetShape
from shearing.pruning.gates import Gates
from shearing.pruning.lagrangian import Lagrangian
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import gate_groups, target_shape
from shearing.training.mask_learning import MaskLearner, learned_gates


@pytest.fixture
def learner_of(tiny_run):
    def make(rank=0, target=None, **gates):
        settings = {"sparsity_warmup_steps": 3, "learning_rate": 0.3} | gates
        phase = tiny_run.phase(pruning=True, training={"gates": settings, "target": target or TARGET})
        config, pruning = read_config(phase.model), phase.pruning
        shape = shape_of(config)
        groups = gate_groups(shape, target_shape(shape, pruning.target))
        slots = attach_gates(load_model(phase.model), family_of(config))
        return MaskLearner(Gates(groups, seed=3), Lagrangian(groups, 3), slots, pruning, seed=3, rank=rank)

    return make


def samples(learner, steps):
    found = []
    for step in steps:
        learner.open(step)
        found.append({name: z.detach() for name, z in learner.sample.items()})
    return found


class TestNoise:
    def test_shared_by_all_ranks(self, learner_of):
        # catches a run that depends on the number of workers
        one, other = (samples(learner_of(rank), [0, 1]) for rank in (0, 1))
        assert [largest_difference(a, b) for a, b in zip(one, other, strict=True)] == [0, 0]

    def test_a_draw_for_each_rank(self, learner_of):
        # catches `per_rank` that draws the same for all, or draws the shared one on rank 0
        draws = [samples(learner_of(rank, noise="per_rank"), [0])[0] for rank in (0, 1)] + samples(learner_of(), [0])
        assert min(largest_difference(draws[a], draws[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.01

    def test_is_of_the_step_alone(self, learner_of):
        # catches noise out of a stream: a resumed run would draw other gates
        learner = learner_of()
        in_order, back = samples(learner, [0, 1, 2]), samples(learner, [2, 0])
        assert largest_difference(in_order[2], back[0]) == largest_difference(in_order[0], back[1]) == 0
        assert largest_difference(in_order[0], in_order[1]) > 0.01


class TestClose:
    def test_evaluation_is_without_noise(self, learner_of):
        # catches held-out losses that differ from one look to the next
        learner = learner_of()
        set_gates = {}
        learner.slots.set = set_gates.update
        learner.open(3)
        learner.close()
        assert all((z > 0).all() for z in set_gates.values())  # at the start nearly all gates are expected open


class TestUpdate:
    def test_multipliers_ascend_and_gates_follow(self, tiny_run, one_process):
        # catches multipliers that descend (the constraint would push gates open) and gates left in the engine
        steps = one_process.run(learn, tiny_run.phase(pruning=True, training={"learning_rate": 1e-12}))[0]
        engine_names, sparsity, linear, ranges = steps
        assert not [name for name in engine_names if "alpha" in name or "linear" in name]
        assert all(value < 0 for value in linear.values())  # expected sparsity is below its target
        for name, rows in sparsity.items():
            assert rows[-1]["target"] == pytest.approx(1 - ranges[name], abs=1e-6)
            assert rows[-1]["expected"] > rows[0]["expected"], name

    def test_ranks_that_were_set_apart_come_together(self, tiny_run, two_processes):
        # catches gates that drift apart where two kinds of GPU round differently, until one rank alone has converged
        apart, after = zip(*two_processes.run(disturb_and_learn, tiny_run.phase(pruning=True)), strict=True)
        assert largest_difference(*apart) > 1e-4
        assert largest_difference(*after) == 0


def disturb_and_learn(rank, world, phase):
    trainer = new_trainer(rank, world, phase)
    learner = trainer.learner
    held = {}
    for name, parameter in [*learner.gates.named_parameters(), *learner.lagrangian.named_parameters()]:
        parameter.data.add_(1e-3 * rank)
        held[name] = parameter
    apart = {name: parameter.detach().clone() for name, parameter in held.items()}
    batch = trainer.next_batch()
    trainer.open_gates()
    trainer.forward_backward(batch)
    trainer.update_gates()
    return apart, {name: parameter.detach().clone() for name, parameter in held.items()}


def learn(rank, world, phase):
    trainer, sparsity = new_trainer(rank, world, phase), {}
    for _ in range(6):
        batch = trainer.next_batch()
        trainer.open_gates()
        sums = trainer.forward_backward(batch)
        trainer.update_gates()
        for name, row in trainer.finish_step(batch, sums)["sparsity"].items():
            sparsity.setdefault(name, []).append(row)
    learner = trainer.learner
    linear = {name: float(value.detach()) for name, value in learner.lagrangian.linear.items()}
    kept = {name: spec.target / spec.size for name, spec in learner.gates.groups.items()}
    return [name for name, _ in trainer.engine.named_parameters()], sparsity, linear, kept


class TestTensors:
    def test_round_trip(self, learner_of):
        # catches a multiplier or a group that is not saved, and tensors shared with the learner that goes on
        learner, again = learner_of(), learner_of()
        with torch.no_grad():
            for number, parameter in enumerate([*learner.gates.parameters(), *learner.lagrangian.parameters()]):
                parameter.add_(0.1 * (number + 1))
        saved = learner.tensors()
        again.load(saved)
        assert largest_difference(again.tensors(), saved) == 0
        assert {name.split(":")[0] for name in saved} == {"gates", "lagrangian"}
        assert len(saved) == 5 + 2 * 5

    def test_of_other_groups_are_refused(self, learner_of):
        # catches gates of another target loaded in part
        smaller = learner_of(target={"num_layers": 2}).tensors()
        with pytest.raises(ValueError, match="other gate groups"):
            learner_of().load(smaller)

    def test_learned_gates(self, learner_of, tiny_run):
        # catches extraction from gates at their initial values
        learner = learner_of()
        with torch.no_grad():
            learner.gates.log_alpha["hidden"].uniform_(-2, 2)
        shape = shape_of(read_config(tiny_run.model))
        groups = gate_groups(shape, target_shape(shape, TargetShape(**TARGET)))
        found = learned_gates(learner.tensors(), Gates(groups))
        assert largest_difference(found.deterministic(True), learner.gates.deterministic(True)) == 0


class TestOutcome:
    def test_names_what_did_not_arrive(self, learner_of):
        # catches a run that is called converged whatever its gates came to
        learner = learner_of()
        assert not learner.outcome()["converged"]
        with torch.no_grad():
            for name, log_alpha in learner.gates.log_alpha.items():
                log_alpha.fill_(-4.6)
                log_alpha[..., : learner.gates.groups[name].target] = 4.6
        outcome = learner.outcome()
        wide = {name for name, gaps in outcome["gaps"].items() if max(gaps) > 0.01}
        assert outcome["converged"] == (not wide)
        assert len(outcome["missed"]) == len(wide)
        assert len(outcome["gaps"]["intermediate"]) == 3
        assert len(outcome["gaps"]["hidden"]) == 1
