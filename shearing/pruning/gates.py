"""Hard-concrete gates (arXiv 1712.01312) as Sheared LLaMA uses them (arXiv 2310.06694, section 2.1).

Gates and everything made of them are float32 on the CPU or wherever the module is moved; [.., N] stands for the
shape of a group, its last dimension the units of a row.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shearing.models.family import shape_of
from shearing.pruning.config import PruningConfig
from shearing.pruning.overall import OVERALL, OverallSparsity
from shearing.pruning.target import GroupSpec, pruning_groups

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


def expected_units(open_p: Tensor) -> Tensor:
    """Whole number of units that a row of P(z > 0) expects to stay, [..] of [.., N]."""
    size = open_p.shape[-1]
    return size - torch.round(size - open_p.sum(-1)).long()


def largest_gates(scores: Tensor, units: int | Tensor) -> Tensor:
    """The largest scores of every row, the others set to 0, [.., N]. Of equal scores the later unit goes first.

    Args:
        scores: [.., N].
        units: How many of a row stay: one number, or [..].
    """
    rank = torch.argsort(torch.argsort(scores, dim=-1, descending=True, stable=True), dim=-1)
    stay = rank < torch.as_tensor(units, device=scores.device).unsqueeze(-1)
    return torch.where(stay, scores, torch.zeros_like(scores))


class Gates(nn.Module):
    """All gates of a model: one float32 `log_alpha` a group, kept outside of any engine's partitions.

    Gates that a group forces to stay or go are the constants 1 and 0, sampled and deterministic alike: P(z > 0) is 1
    or 0, their `log_alpha` stays at its limit and has no gradient, and they count as decided.

    Args:
        groups: Group specifications by name, from `shearing.pruning.target.gate_groups`.
        initial_log_alpha: Mean of the initial values; below the clamp at log 100, so that gates start distinct.
        initial_log_alpha_std: Their standard deviation.
        seed: Of the initial values.
        overall: What all groups together are to leave, where no group has a target of its own.
    """

    def __init__(
        self,
        groups: Mapping[str, GroupSpec],
        initial_log_alpha: float = 3.0,
        initial_log_alpha_std: float = 0.1,
        seed: int = 0,
        overall: OverallSparsity | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.overall = dict(groups), overall
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict(
            {
                name: nn.Parameter(
                    initial_log_alpha + initial_log_alpha_std * torch.randn(spec.shape, generator=generator)
                )
                for name, spec in self.groups.items()
            }
        )
        self._forced: dict[str, Tensor] = {}  # NaN where a gate is free; not in the state, for the recipe says it
        for name, spec in self.groups.items():
            if spec.kept or spec.dropped:
                self._force(name, spec)
        self.clamp_()

    @torch.no_grad()
    def _force(self, name: str, spec: GroupSpec) -> None:
        forced = torch.full(spec.shape, math.nan)
        for units, gate, limit in ((spec.kept, 1.0, LOG_ALPHA_LIMIT), (spec.dropped, 0.0, -LOG_ALPHA_LIMIT)):
            forced[..., list(units)] = gate
            self.log_alpha[name][..., list(units)] = limit
        self._forced[name] = forced

    def _with_forced(self, name: str, values: Tensor) -> Tensor:
        """Gates or probabilities of a group with the constants in place, which takes their gradient away."""
        if name not in self._forced:
            return values
        forced = self._forced[name].to(values.device)
        return torch.where(forced.isnan(), values, forced)

    def open_probabilities(self) -> dict[str, Tensor]:
        """P(z > 0) of every gate by group, differentiable where a gate is free."""
        return {name: self._with_forced(name, open_probability(a)) for name, a in self.log_alpha.items()}

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
        return {
            name: self._with_forced(name, sample_gates(a, noise[name].to(a.device)))
            for name, a in self.log_alpha.items()
        }

    @torch.no_grad()
    def deterministic(self, exact: bool) -> dict[str, Tensor]:
        """Gates without noise: at the target's exact size, or at the size that the gates expect now, rounded."""
        scores = {name: self._with_forced(name, soft_scores(a)) for name, a in self.log_alpha.items()}
        if exact and self.overall is not None:
            chosen = self.overall.choose({name: self._ranked(name, a) for name, a in self.log_alpha.items()})
            return {name: score * chosen[name].to(score.device) for name, score in scores.items()}
        gates = {}
        for name, open_p in self.open_probabilities().items():
            target = self.groups[name].target if exact else expected_units(open_p)
            assert target is not None
            gates[name] = largest_gates(scores[name], target)
        return gates

    def _ranked(self, name: str, log_alpha: Tensor) -> Tensor:
        """`log_alpha` with infinities where a gate is forced."""
        if name not in self._forced:
            return log_alpha
        forced = self._forced[name].to(log_alpha.device)
        return torch.where(forced.isnan(), log_alpha, (2 * forced - 1) * math.inf)

    def expected_sparsity(self) -> dict[str, Tensor]:
        """Expected share of closed gates, differentiable: one number a layer, [rows], or a scalar for a shared row."""
        return {name: 1 - open_p.mean(-1) for name, open_p in self.open_probabilities().items()}

    def constrained(self) -> dict[str, Tensor]:
        """What the constraint holds to its targets, differentiable: every group's expected sparsity, or the overall."""
        if self.overall is None:
            return self.expected_sparsity()
        return {OVERALL: self.overall.expected(self.open_probabilities())}

    @property
    def goals(self) -> Mapping[str, GroupSpec | OverallSparsity]:
        """Whose `target_sparsity` the constraint works towards, by the names of `constrained`."""
        return self.groups if self.overall is None else {OVERALL: self.overall}

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings every log_alpha back into [-log 100, log 100]; to be called after each optimiser step."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT)

    @torch.no_grad()
    def undecided(self) -> dict[str, Tensor]:
        """How many gates of each row have 0.05 < P(z > 0) < 0.95: [rows], or a scalar for a shared row."""
        low, high = UNDECIDED_BAND
        return {name: ((p > low) & (p < high)).sum(-1) for name, p in self.open_probabilities().items()}


def gates_for(model_config: Any, config: PruningConfig, seed: int = 0) -> Gates:
    """The gates of a recipe's pruning section over a source model, from the model's config."""
    overall = OverallSparsity.asked(model_config, config.target) if config.target.is_overall else None
    options = config.gates
    groups = pruning_groups(shape_of(model_config), config)
    return Gates(groups, options.initial_log_alpha, options.initial_log_alpha_std, seed, overall)
