"""The divergence from a teacher against closed forms and autograd, and whole phases that learn from one."""

import math

import pytest
import torch
from phase_runs import PROPORTIONS, SHAPE, largest_difference, new_trainer, run_phase
from plain_reference import plain_divergence, plain_run

from shearing.errors import UserError
from shearing.models.family import llama_config
from shearing.models.loading import new_model
from shearing.training import distillation
from shearing.training.config import DistillationConfig
from shearing.training.distillation import Teacher, divergences

SAVED_AFTER = 3


def random_logits(*, dtype=torch.float32, vocabulary=13):
    torch.manual_seed(0)
    student_BTV, teacher_BTV = (2 * torch.randn(3, 7, vocabulary) for _ in range(2))
    return student_BTV.to(dtype).requires_grad_(), teacher_BTV.to(dtype)


class TestDivergence:
    def test_closed_form(self):
        # catches KL(student || teacher), which these numbers tell apart; bits taken for nats; the last position counted
        student_BTV = torch.tensor([[[0.0, 0.0], [50.0, 0.0]]])
        teacher_BTV = torch.tensor([[[math.log(3.0), 0.0], [0.0, 50.0]]])
        expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        assert divergences(student_BTV, teacher_BTV, 1.0).tolist() == pytest.approx([expected], abs=1e-7)
        other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
        assert abs(other - expected) > 0.01

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("rows_at_once", [1, 4, 100])
    def test_gradient_is_autograds(self, temperature, rows_at_once, monkeypatch):
        # catches rows left out or counted twice between pieces, a gradient not divided by temperature or positions
        monkeypatch.setattr(distillation, "FLOAT32_LOGITS_AT_ONCE", rows_at_once * 13)
        student_BTV, teacher_BTV = random_logits()
        weights_B = torch.tensor([1.0, 0.5, -2.0])
        found_B = divergences(student_BTV, teacher_BTV, temperature)
        (found_B * weights_B).sum().backward()
        plain_BTV = student_BTV.detach().double().requires_grad_()
        plain = [plain_divergence(teacher_BTV[b : b + 1].double(), plain_BTV[b : b + 1], temperature) for b in range(3)]
        sum(value * weight for value, weight in zip(plain, weights_B.double(), strict=True)).backward()
        assert found_B.tolist() == pytest.approx([value.item() for value in plain], abs=1e-6)
        torch.testing.assert_close(student_BTV.grad.double(), plain_BTV.grad, atol=1e-8, rtol=1e-5)
        assert (student_BTV.grad[:, -1] == 0).all()

    def test_bfloat16_logits_are_compared_in_float32(self):
        # catches softmax in bfloat16, and a weight of 0.3 that is rounded to 0.3008 for every gradient
        student_BTV, teacher_BTV = random_logits(dtype=torch.bfloat16)
        (0.3 * divergences(student_BTV, teacher_BTV, 1.0)).sum().backward()
        plain_BTV = student_BTV.detach().double().requires_grad_()
        value = plain_divergence(teacher_BTV.double(), plain_BTV, 1.0)
        (0.3 * 3 * value).backward()
        assert divergences(student_BTV, teacher_BTV, 1.0).mean().item() == pytest.approx(value.item(), abs=1e-6)
        ratio = (student_BTV.grad.double() * plain_BTV.grad).sum() / plain_BTV.grad.square().sum()
        assert ratio.item() == pytest.approx(1, abs=5e-4)

    def test_a_student_that_is_its_teacher_learns_nothing(self):
        # catches a gradient of rounding that moves a perfect student; exactly zero, not nearly
        student_BTV, _ = random_logits()
        divergence_B = divergences(student_BTV, student_BTV.detach().clone(), 2.0)
        divergence_B.sum().backward()
        assert divergence_B.tolist() == [0.0] * 3
        assert (student_BTV.grad == 0).all()

    def test_a_second_backward_is_refused(self):
        # catches the gradient, changed in place by the first, used again in silence
        student_BTV, teacher_BTV = random_logits()
        loss = divergences(student_BTV, teacher_BTV, 1.0).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_nothing_of_the_graph_is_float32(self):
        # catches logits of teacher or student kept in float32 for the backward pass: the memory that --plan leaves out
        student_BTV, teacher_BTV = random_logits(dtype=torch.bfloat16)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            divergences(student_BTV, teacher_BTV, 1.0)
        assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bfloat16, student_BTV.shape)]


def taught(tiny_run, *, weight=0.5, temperature=2.0, **changed):
    """A student that is another model than its teacher."""
    config = {"weight": weight, "temperature": temperature, "teacher": tiny_run.model}
    return tiny_run.phase(**{"model": tiny_run.tied, "distillation": config} | changed)


class TestPhases:
    @pytest.mark.parametrize(("stage", "weight"), [(1, 1.0), (2, 0.3), (3, 0.5)])
    def test_two_ranks_against_plain_torch(self, tiny_run, two_processes, stage, weight):
        # catches a teacher that trains, or is parted among the workers by ZeRO 3; a KL weighed by micro-batches; T^2
        training = {"steps": 4, "evaluate_every_steps": 100, "gradient_clip": 0.3}
        phase = taught(tiny_run, weight=weight, stage=stage, training=training, mixture={"rule": "static"})
        run = two_processes.run(run_phase, phase)[0]
        history, model, optimizer, _ = plain_run(phase)
        for report, expected in zip(run.of_kind("step"), history, strict=True):
            keys = ("loss", "divergence", "gradient_norm")
            assert {k: report[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, abs=1e-5, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(run.tensors[name], parameter.detach(), atol=2e-5, rtol=1e-4)
            moment = optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(run.tensors[f"{name}::exp_avg"], moment, atol=1e-7, rtol=1e-3)

    def test_weight_0_is_plain_training(self, tiny_run, one_process):
        # catches anything that a teacher changes by being there: losses, random state, weights; to the last bit
        without = one_process.run(run_phase, tiny_run.phase(model=tiny_run.tied))[0]
        beside = one_process.run(run_phase, taught(tiny_run, weight=0.0))[0]
        told = [{key: value for key, value in row.items() if key != "divergence"} for row in beside.history()]
        assert told == without.history()
        assert largest_difference(beside.tensors, without.tensors) == 0
        assert all(row["divergence"] > 0 for row in beside.of_kind("step"))

    @pytest.mark.parametrize("stage", [2, 3])
    def test_with_a_moving_mixture_and_an_interruption(self, tiny_run, two_processes, tmp_path, stage):
        # catches a teacher in the checkpoint, and a mixture that is moved by the blended loss
        folder = str(tmp_path / "checkpoint")
        mixture = {"rule": "sheared", "loss_from": "train"}
        phase = taught(tiny_run, stage=stage, mixture=mixture, training={"update_mixture_every_steps": 2})
        whole = two_processes.run(run_phase, phase, save_after=SAVED_AFTER, folder=folder)
        rest = two_processes.run(run_phase, phase, resume=folder)
        assert rest[0].history() == whole[0].history(after=SAVED_AFTER)
        assert largest_difference(rest[0].tensors, whole[0].tensors) == 0
        steps, update = whole[0].of_kind("step")[:2], whole[0].of_kind("mixture")[0]
        pasts = [dict.fromkeys(PROPORTIONS, 0), steps[0]["drawn"]]
        for domain in PROPORTIONS:
            counts = [row["drawn"][domain] - past[domain] for past, row in zip(pasts, steps, strict=True)]
            mean = sum(row["losses"].get(domain, 0) * n for row, n in zip(steps, counts, strict=True)) / sum(counts)
            assert update["losses"][domain] == pytest.approx(mean, abs=1e-9)

    def test_a_student_learns_from_its_teacher_alone(self, tiny_run, one_process):
        # catches a sign or direction that drives them apart
        phase = taught(tiny_run, weight=1.0, temperature=1.0, training={"steps": 12, "learning_rate": 1e-2})
        steps = one_process.run(run_phase, phase)[0].of_kind("step")
        assert steps[-1]["divergence"] < 0.8 * steps[0]["divergence"]

    def test_the_teacher_belongs_to_nobody(self, tiny_run, two_processes):
        # catches a teacher in the optimiser, in training mode, or parted by ZeRO 3
        for found in two_processes.run(teacher_facts, taught(tiny_run, stage=3)):
            assert found == {"trained": 0, "training": False, "parted": 0, "shared": 0}


def teacher_facts(rank, world, phase):
    trainer = new_trainer(rank, world, phase)
    model = trainer.teacher.model
    engine = {id(parameter) for parameter in trainer.engine.model.parameters()}
    return {
        "trained": sum(parameter.requires_grad for parameter in model.parameters()),
        "training": any(module.training for module in model.modules()),
        "parted": sum(hasattr(parameter, "ds_id") for parameter in model.parameters()),
        "shared": sum(id(parameter) in engine for parameter in model.parameters()),
    }


def test_another_vocabulary_is_refused():
    # catches logits compared by position in vocabularies that mean different tokens
    model = new_model(llama_config(SHAPE, 101, 64, eos_token_id=1))
    teacher = Teacher(model, DistillationConfig(), torch.device("cpu"))
    with pytest.raises(UserError, match="the teacher has 101 logits a token, the student 97"):
        teacher.divergences(torch.zeros(1, 4, 97), torch.zeros(1, 4, dtype=torch.long))
