"""Hard-concrete gates (arXiv 1712.01312) as Sheared LLaMA uses them (arXiv 2310.06694, section 2.1).

Gates and everything made of them are float32 on the CPU or wherever the module is moved; [.., N] stands for the
shape of a group, its last dimension the units of a row.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from shearing.pruning.target import GroupSpec

TEMPERATURE = 2 / 3
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
NOISE_MARGIN = 1e-6  # uniform noise and P(z > 0) keep this distance from 0 and 1
LOG_ALPHA_LIMIT = math.log(1e2)
SOFT_SCALE = 0.8  # of log alpha in deterministic scores; the published code's constant
UNDECIDED_BAND = (0.05, 0.95)  # of P(z > 0): a gate inside has not made up its mind


def sample_gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Gates z in [0, 1] of uniform noise in (0, 1), both [.., N]; differentiable in log_alpha."""
    logits = torch.log(noise) - torch.log1p(-noise)
    s = torch.sigmoid((logits + log_alpha) / TEMPERATURE)
    return (s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of every gate, [.., N]; differentiable."""
    shifted = log_alpha - TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)
    return torch.sigmoid(shifted).clamp(NOISE_MARGIN, 1 - NOISE_MARGIN)


def soft_scores(log_alpha: Tensor) -> Tensor:
    """What a gate is worth without noise, in (0, 1), [.., N]."""
    return torch.sigmoid(SOFT_SCALE * log_alpha / TEMPERATURE)


def deterministic_gates(log_alpha: Tensor, target: int | None = None) -> Tensor:
    """Gates without noise, [.., N]: soft scores, the smallest of every row set to 0.

    Args:
        log_alpha: [.., N].
        target: Units of a row that stay; None for the number that the gates expect, rounded. Of equal scores the
            later unit goes first.
    """
    size = log_alpha.shape[-1]
    rows = log_alpha.reshape(-1, size)
    scores = soft_scores(rows)
    if target is None:
        removed = torch.round(size - open_probability(rows).sum(-1)).long()
    else:
        removed = torch.full((rows.shape[0],), size - target, device=rows.device)
    rank = torch.argsort(torch.argsort(scores, dim=-1, descending=True, stable=True), dim=-1)
    keep = rank < (size - removed)[:, None]
    return torch.where(keep, scores, torch.zeros_like(scores)).reshape(log_alpha.shape)


class Gates(nn.Module):
    """All gates of a model: one float32 `log_alpha` a group, kept outside of any engine's partitions.

    Args:
        groups: Group specifications by name, from `shearing.pruning.target.gate_groups`.
        initial_log_alpha: Mean of the initial values; below the clamp at log 100, so that gates start distinct.
        initial_log_alpha_std: Their standard deviation.
        seed: Of the initial values.
    """

    def __init__(
        self,
        groups: Mapping[str, GroupSpec],
        initial_log_alpha: float = 3.0,
        initial_log_alpha_std: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.groups = dict(groups)
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict(
            {
                name: nn.Parameter(
                    initial_log_alpha + initial_log_alpha_std * torch.randn(spec.shape, generator=generator)
                )
                for name, spec in self.groups.items()
            }
        )
        self.clamp_()

    def noise(self, seed: int, step: int, rank: int | None = None) -> dict[str, Tensor]:
        """Uniform noise for one optimiser step, a pure function of its arguments.

        Args:
            seed: Of the run.
            step: Optimiser step.
            rank: None for one draw that all ranks share; a rank's number for a draw of its own.
        """
        words = np.random.SeedSequence([seed, step, 0 if rank is None else rank + 1]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        draw = {name: torch.rand(spec.shape, generator=generator) for name, spec in self.groups.items()}
        return {name: u.mul_(1 - 2 * NOISE_MARGIN).add_(NOISE_MARGIN) for name, u in draw.items()}

    def sample(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates z of the given noise, differentiable in log_alpha."""
        return {name: sample_gates(a, noise[name].to(a.device)) for name, a in self.log_alpha.items()}

    @torch.no_grad()
    def deterministic(self, exact: bool) -> dict[str, Tensor]:
        """Gates without noise: at the target's exact size, or at the size that the gates expect now, rounded."""
        return {
            name: deterministic_gates(a, self.groups[name].target if exact else None)
            for name, a in self.log_alpha.items()
        }

    def expected_sparsity(self) -> dict[str, Tensor]:
        """Expected share of closed gates, differentiable: one number a layer, [rows], or a scalar for a shared row."""
        return {name: 1 - open_probability(a).mean(-1) for name, a in self.log_alpha.items()}

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings every log_alpha back into [-log 100, log 100]; to be called after each optimiser step."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    @torch.no_grad()
    def undecided(self) -> dict[str, int]:
        """Gates of each group with 0.05 < P(z > 0) < 0.95."""
        low, high = UNDECIDED_BAND
        counts = {}
        for name, log_alpha in self.log_alpha.items():
            open_p = open_probability(log_alpha)
            counts[name] = int(((open_p > low) & (open_p < high)).sum())
        return counts
