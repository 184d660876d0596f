"""Knowledge distillation in continued pretraining: a frozen teacher on the same worker, and the divergence from it.

Source: Hinton et al., arXiv 1503.02531, section 2. Shapes: B sequences of a micro-batch, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shearing.errors import UserError
from shearing.training.config import DistillationConfig

FLOAT32_LOGITS_AT_ONCE = 2**24  # 64 MiB each for teacher and student


class Teacher:
    """A model that is only asked: whole on every worker, frozen, in evaluation mode, and part of no optimiser.

    Args:
        model: Of the student's vocabulary.
        config: Weight and temperature.
        device: Where the student's logits are.
    """

    def __init__(self, model: nn.Module, config: DistillationConfig, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.config = config

    def divergences(self, student_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean KL(teacher || student) [B] of each sequence, nats a token, both at the temperature.

        Over the positions that have a next token, as the cross-entropy. Raises UserError where the vocabularies differ.
        """
        with torch.no_grad():
            output: Any = self.model(input_ids=tokens_BT, use_cache=False)
        teacher_BTV: torch.Tensor = output.logits
        if teacher_BTV.shape[-1] != student_BTV.shape[-1]:
            raise UserError(
                f"recovery.distillation: the teacher has {teacher_BTV.shape[-1]:,} logits a token, the student "
                f"{student_BTV.shape[-1]:,}; both have to be over one vocabulary. Set recovery.distillation.teacher to "
                "a model with the source's tokenizer, or to null for the source itself."
            )
        return divergences(student_BTV, teacher_BTV, self.config.temperature)

    def blend(self, loss: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        """(1 - w) cross-entropy + w T^2 KL; T^2 keeps the KL's gradients at one size whatever the temperature."""
        weight, temperature = self.config.weight, self.config.temperature
        return (1 - weight) * loss + weight * temperature**2 * divergence


def divergences(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over the first T - 1 positions of KL(teacher || student) [B] in nats a token, differentiable in the student.

    In float32, a few rows at a time: kept for the backward pass is one gradient in the student's dtype and nothing in
    float32.
    """
    found: torch.Tensor = _Divergences.apply(student_BTV, teacher_BTV, temperature)
    return found


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
        """The gradient is known with the value: (softmax(student / t) - softmax(teacher / t)) / t for each row."""
        positions = student_BTV.shape[1] - 1
        rows_at_once = max(1, FLOAT32_LOGITS_AT_ONCE // student_BTV.shape[-1])
        gradient_BTV = torch.zeros_like(student_BTV) if ctx.needs_input_grad[0] else None
        mean_B = torch.zeros(len(student_BTV), dtype=torch.float32, device=student_BTV.device)
        for sequence in range(len(student_BTV)):
            for start in range(0, positions, rows_at_once):
                rows = slice(start, min(start + rows_at_once, positions))
                log_student = functional.log_softmax(student_BTV[sequence, rows].float() / temperature, dim=-1)
                log_teacher = functional.log_softmax(teacher_BTV[sequence, rows].float() / temperature, dim=-1)
                teacher = log_teacher.exp()
                mean_B[sequence] += (teacher * (log_teacher - log_student)).sum() / positions
                if gradient_BTV is not None:
                    gradient_BTV[sequence, rows] = log_student.exp_().sub_(teacher).div_(temperature * positions)
        if gradient_BTV is not None:
            ctx.save_for_backward(gradient_BTV)
        return mean_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean_B: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """In place: nobody else holds the saved gradient, and a second use of it is refused by autograd."""
        (gradient_BTV,) = ctx.saved_tensors
        return gradient_BTV.mul_(of_mean_B[:, None, None]), None, None  # by the weight as it is, in float32
