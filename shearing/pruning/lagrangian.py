"""The Lagrangian constraint on gates (arXiv 2310.06694, equation 3), and the optimiser of both.

The constraint is written on fractions, as the published code has it: with learning rate 1.0 for gates and multipliers
the scale matters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearing.pruning.config import GatesConfig
from shearing.pruning.gates import Gates
from shearing.pruning.overall import OVERALL, OverallSparsity
from shearing.pruning.target import GroupSpec

MOST_RISE = 1e3


def constraint(expected: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """`linear (s - t) + quadratic (s - t)^2`, averaged over the layers of s; a scalar.

    Args:
        expected: s, expected sparsity: [layers] or a scalar.
        target: t, the sparsity asked for now.
        linear: First multiplier, a scalar.
        quadratic: Second multiplier, a scalar.
    """
    gap = expected - target
    return (linear * gap + quadratic * gap.square()).mean()


def ramped_sparsity(end: float, step: int, warmup_steps: int, start: float = 0.0) -> float:
    """Target sparsity at a step: linear from `start` at step 0 to `end` at `warmup_steps`, constant after."""
    share = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    return start + (end - start) * share


@dataclass(frozen=True)
class ExtraSteps:
    """A rising penalty after the last regular step, until every gap is closed.

    The gap's square gets a penalty of its own, worth both multipliers together times `growth^k - 1` in the k-th extra
    step, at most MOST_RISE times: it begins at nothing, and ends the slow swing about the target that multipliers keep
    up by themselves.

    Attributes:
        after: The number of regular steps.
        growth: Of the penalty, a step.
    """

    after: int
    growth: float

    def rise(self, step: int) -> float:
        """The penalty on the gap's square in units of the multipliers."""
        number = max(0, step - self.after + 1)
        if number * math.log(self.growth) > math.log1p(MOST_RISE):
            return MOST_RISE
        return float(self.growth**number - 1)


class Lagrangian(nn.Module):
    """Two float32 multipliers a group, from zero unless said; they ascend while gates and weights descend.

    Args:
        groups: What has a target sparsity, by name: gate groups, or the overall sparsity.
        sparsity_warmup_steps: Steps over which every target sparsity ramps to its end.
        start_sparsity: Target sparsity of every group at step 0.
        extra: The steps after the regular ones, where there are any: their penalty rises.
        initial_quadratic: The quadratic multipliers at the begin. From zero both ascend by Adam's steps of one size
            while gates have not moved yet, and press until sparsity is up to |linear| / (2 quadratic) = 0.5 above its
            target; a penalty that is there from the start (augmented Lagrangian) stops where the target is.
    """

    def __init__(
        self,
        groups: Mapping[str, GroupSpec | OverallSparsity],
        sparsity_warmup_steps: int = 0,
        start_sparsity: float = 0.0,
        extra: ExtraSteps | None = None,
        initial_quadratic: float = 0.0,
    ) -> None:
        super().__init__()
        self.groups = dict(groups)
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self.start_sparsity = start_sparsity
        self.extra = extra
        self.linear = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.groups})
        self.quadratic = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(float(initial_quadratic))) for name in self.groups}
        )

    def target_sparsity(self, step: int) -> dict[str, float]:
        """Target sparsity of each group at a step."""
        return {
            name: ramped_sparsity(spec.target_sparsity, step, self.sparsity_warmup_steps, self.start_sparsity)
            for name, spec in self.groups.items()
        }

    def loss(self, expected: Mapping[str, Tensor], step: int) -> Tensor:
        """The constraint's part of the loss: the sum of all groups' constraints, a scalar.

        Args:
            expected: Expected sparsity by name, from `Gates.constrained`.
            step: Optimiser step.
        """
        targets = self.target_sparsity(step)
        rise = self.extra.rise(step) if self.extra else 0.0
        terms = []
        for name, s in expected.items():
            linear, quadratic = self.linear[name], self.quadratic[name]
            terms.append(constraint(s, targets[name], linear, quadratic))
            if rise:  # detached: the multipliers ascend as they always did
                penalty = rise * (linear.abs() + quadratic.abs()).detach()
                terms.append(constraint(s, targets[name], torch.zeros_like(penalty), penalty))
        return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def sparsity_metrics(gates: Gates, lagrangian: Lagrangian, step: int) -> dict[str, dict[str, Any]]:
    """Where every group stands, as shares and as units.

    Returns:
        By group: `expected` sparsity (mean over layers), `target` sparsity now, `undecided` gates in all,
        `largest_layer_gap` of sparsity; and in units of a row `size`, `target_units` now, and for every layer (or the
        one shared row) `expected_units` and `undecided_units`. Under an overall sparsity groups have no target (None),
        and `overall`, whose units are parameters, has.
    """
    targets, undecided = lagrangian.target_sparsity(step), gates.undecided()
    expected, sizes = gates.expected_sparsity(), {name: spec.size for name, spec in gates.groups.items()}
    if gates.overall is not None:
        expected = gates.constrained() | expected
        sizes[OVERALL] = gates.overall.total
        undecided[OVERALL] = torch.stack([count.sum() for count in undecided.values()]).sum()
    metrics = {}
    for name, s in expected.items():
        size, target = sizes[name], targets.get(name)
        metrics[name] = {
            "expected": float(s.mean()),
            "target": target,
            "undecided": int(undecided[name].sum()),
            "largest_layer_gap": None if target is None else float((s - target).abs().max()),
            "size": size,
            "target_units": None if target is None else round(size * (1 - target), 2),
            "expected_units": [round(size * (1 - row), 2) for row in s.reshape(-1).tolist()],
            "undecided_units": undecided[name].reshape(-1).tolist(),
        }
    return metrics


@torch.no_grad()
def final_gaps(gates: Gates) -> dict[str, list[float]]:
    """|expected - final target| of each group, one number a layer (one for a shared row, or for the overall)."""
    return {
        name: (s - gates.goals[name].target_sparsity).abs().reshape(-1).tolist()
        for name, s in gates.constrained().items()
    }


def unconverged(gates: Gates, tolerance: float) -> list[str]:
    """A message for every group with a row further from its target than `tolerance`; an empty list when all arrived."""
    messages = []
    for name, gaps in final_gaps(gates).items():
        wide = [f"layer {row}: {gap:.3f}" for row, gap in enumerate(gaps) if gap > tolerance]
        if not wide:
            continue
        where = f"by {gaps[0]:.3f}" if len(gaps) == 1 else f"in {len(wide)} of {len(gaps)} layers ({', '.join(wide)})"
        messages.append(
            f"gates of {name!r} are further than {tolerance:g} from their target sparsity "
            f"{gates.goals[name].target_sparsity:.3f} {where}"
        )
    return messages


def build_gate_optimizer(
    gates: Gates, lagrangian: Lagrangian, config: GatesConfig, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.Adam:
    """Adam without weight decay: gates descend, multipliers ascend, every log_alpha is clamped after each step.

    The learning rate is constant; clipping is left to the caller. Source: arXiv 2310.06694, table 7.
    """
    multiplier_rate = config.multiplier_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": list(gates.named_parameters())},
        {"params": list(lagrangian.named_parameters()), "lr": multiplier_rate, "maximize": True},
    ]
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=betas)
    optimizer.register_step_post_hook(lambda *_: gates.clamp_())
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as plain tensors named `<parameter>/<quantity>`; empty before the first step."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for quantity, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{quantity}"] = value.detach().clone()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, exactly.

    Raises:
        ValueError: A name that is none of the optimiser's parameters.
    """
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in parameters:
            raise ValueError(
                f"optimizer state holds {key!r}, but the optimizer's parameters are {', '.join(parameters)}: "
                "the checkpoint belongs to other gate groups. Resume with the recipe that wrote it."
            )
        parameter = parameters[name]
        device = "cpu" if quantity == "step" else parameter.device  # where Adam keeps its counter of steps
        optimizer.state[parameter][quantity] = value.detach().to(device, copy=True)
