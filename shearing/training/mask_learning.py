"""Gates beside the engine: float32, one optimiser of their own, never inside the ZeRO partitions.

ZeRO would cast them to bfloat16, clip their gradient together with the weights', and overwrite the multipliers'
ascent when a checkpoint is loaded for another number of workers.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shearing.pruning.config import PruningConfig
from shearing.pruning.gates import Gates
from shearing.pruning.lagrangian import (
    Lagrangian,
    build_gate_optimizer,
    final_gaps,
    load_optimizer_tensors,
    optimizer_tensors,
    sparsity_metrics,
    unconverged,
)
from shearing.pruning.masks import GateSlots


class MaskLearner:
    """Opens gates before a step, learns them after it. Every rank holds the same gates and does the same with them;
    what rounding may still have set apart, a broadcast sets right at each step.

    With `noise: shared` (default) all ranks and micro-batches of a step see one draw, so that a run does not depend
    on the number of workers; `per_rank` averages over more draws, as the published code does.
    """

    def __init__(
        self, gates: Gates, lagrangian: Lagrangian, slots: GateSlots, config: PruningConfig, *, seed: int, rank: int
    ) -> None:
        self.gates, self.lagrangian, self.slots = gates, lagrangian, slots
        self.config, self.seed = config, seed
        self.noise_rank = rank if config.gates.noise == "per_rank" else None
        self.optimizer = build_gate_optimizer(gates, lagrangian, config.gates)
        self.sample: dict[str, torch.Tensor] = {}
        self.constraint_loss = 0.0
        self.gradient_norm = 0.0

    def open(self, step: int) -> None:
        """Draw this step's gates and let the model compute with them."""
        self.sample = self.gates.sample(self.gates.noise(self.seed, step, self.noise_rank))
        self.slots.set(self.sample)

    def close(self) -> None:
        """Gates without noise, for evaluation: at the size that they expect now."""
        self.slots.set(self.gates.deterministic(exact=False))

    def update(self, step: int) -> None:
        """One step of gates and multipliers from the gradients that the micro-batches left behind (collective)."""
        gradients = self.slots.gradients()
        torch.autograd.backward(list(self.sample.values()), [gradients[name] for name in self.sample])
        world = dist.get_world_size()
        parameters = list(self.gates.parameters())
        for parameter in parameters:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        constraint = self.lagrangian.loss(self.gates.constrained(), step)
        constraint.backward()
        # a clip of their own: mixed with the weights' norm, either could silence the other
        self.gradient_norm = float(nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip))
        self.constraint_loss = float(constraint.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow_first_rank()

    def _follow_first_rank(self) -> None:
        """Take rank 0's values: GPUs of two kinds round the same step in two ways, and `converged` must not differ."""
        parameters = [*self.gates.parameters(), *self.lagrangian.parameters()]
        with torch.no_grad():
            values = torch.cat([parameter.flatten() for parameter in parameters])
            dist.broadcast(values, src=0)
            for parameter, value in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(value.view_as(parameter))

    def converged(self) -> bool:
        """Whether every row of gates is within tolerance of its end."""
        return not unconverged(self.gates, self.config.gates.tolerance)

    def not_finite(self) -> list[str]:
        """Names of gates and multipliers that hold something that is no number."""
        named = [*self.gates.named_parameters(), *self.lagrangian.named_parameters()]
        return [name for name, parameter in named if not bool(torch.isfinite(parameter).all())]

    def report(self, step: int) -> dict[str, Any]:
        """What a step report says of the gates: sizes as sparsity a group, and the constraint."""
        return {
            "lagrangian": self.constraint_loss,
            "gate_gradient_norm": self.gradient_norm,
            "sparsity": sparsity_metrics(self.gates, self.lagrangian, step),
        }

    def outcome(self) -> dict[str, Any]:
        """At the end: the gap of expected to target sparsity a group and layer, and which are beyond tolerance."""
        missed = unconverged(self.gates, self.config.gates.tolerance)
        return {"gaps": final_gaps(self.gates), "converged": not missed, "missed": missed}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Gates, multipliers and their optimiser, as plain tensors."""
        modules = {"gates": self.gates.state_dict(), "lagrangian": self.lagrangian.state_dict()}
        tensors = {f"{kind}:{name}": value for kind, state in modules.items() for name, value in state.items()}
        return tensors | {f"optimizer:{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave. Raises ValueError where it belongs to other gate groups."""
        states: dict[str, dict[str, torch.Tensor]] = {"gates": {}, "lagrangian": {}, "optimizer": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            states[kind][name] = value
        for module, state in ((self.gates, states["gates"]), (self.lagrangian, states["lagrangian"])):
            held = {name: value.shape for name, value in module.state_dict().items()}
            found = {name: value.shape for name, value in state.items()}
            if held != found:
                raise ValueError(
                    f"the checkpoint holds {found}, this recipe asks for {held}: it belongs to other gate groups. "
                    f"Resume with the recipe that wrote it."
                )
            module.load_state_dict(state)
        load_optimizer_tensors(self.optimizer, states["optimizer"])


def learned_gates(tensors: dict[str, torch.Tensor], gates: Gates) -> Gates:
    """Fill `gates` with the values that a checkpoint's `gates` tensors hold."""
    prefix = "gates:"
    gates.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return gates
