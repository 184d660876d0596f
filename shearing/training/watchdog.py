"""Notices within a few steps that a phase goes nowhere, and says why. All ranks see the same figures and agree."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from shearing.training.config import WatchdogConfig


class TrainingDivergedError(RuntimeError):
    """Loss, gradients or gates have gone where training does not come back from; the last checkpoint is good."""


class Watchdog:
    """Losses and gates against what they were; raises TrainingDivergedError where that is bad for long enough.

    What it remembers is part of a checkpoint, so that a resumed phase judges as an uninterrupted one does.
    """

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.bad_losses = 0
        self.bad_gates: dict[str, int] = {}

    @property
    def suspicious(self) -> bool:
        """Whether the last step was bad: such a state is not to be kept."""
        return self.bad_losses > 0 or bool(self.bad_gates)

    @property
    def limit(self) -> float:
        """The largest loss that is not bad, nats a token; infinite before the first step."""
        if not self.losses:
            return math.inf
        return self.config.loss_ratio * statistics.median(self.losses) + self.config.loss_margin_nats

    def see_loss(self, step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Judge the training loss of a step, nats a token, and the norm of its gradient."""
        knob = f"Lower learning_rate (now {learning_rate:g}) or lengthen warmup_steps"
        for what, value in (("training loss", loss), ("norm of the gradient", gradient_norm)):
            if not math.isfinite(value):
                raise TrainingDivergedError(f"step {step}: the {what} is {value}. {knob}")
        if loss <= self.limit:
            self.bad_losses = 0
            self.losses = [*self.losses, loss][-self.config.median_steps :]
            return
        self.bad_losses += 1
        if self.bad_losses >= self.config.loss_steps:
            raise TrainingDivergedError(
                f"step {step}: the training loss is {loss:.3f} nats a token and was above {self.limit:.3f} for "
                f"{self.bad_losses} steps in a row, where its running median is "
                f"{statistics.median(self.losses):.3f} (allowed: {self.config.loss_ratio:g} times that and "
                f"{self.config.loss_margin_nats:g} more). {knob}; where this is no accident, set watchdog.loss_ratio "
                "higher"
            )

    def see_held_out(self, step: int, loss: float, learning_rate: float) -> None:
        """Judge a held-out loss, nats a token: one that is bad is no single batch's accident."""
        if not loss <= self.limit:
            raise TrainingDivergedError(
                f"step {step}: the loss on held-out text is {loss:.4g} nats a token, above {self.limit:.3f} (allowed: "
                f"{self.config.loss_ratio:g} times the running median of the training loss and "
                f"{self.config.loss_margin_nats:g} more). Lower learning_rate (now {learning_rate:g}) or lengthen "
                "warmup_steps; where this is no accident, set watchdog.loss_ratio higher"
            )

    def see_gates(self, step: int, not_finite: list[str], groups: Mapping[str, Any], learning_rate: float) -> None:
        """Judge the gates after a step.

        Args:
            step: Just made.
            not_finite: Names of gates or multipliers that hold something that is no number.
            groups: Where each group stands, from `shearing.pruning.lagrangian.sparsity_metrics`.
            learning_rate: Of gates and multipliers.
        """
        knob = (
            f"Lower pruning.gates.learning_rate (now {learning_rate:g}) or lengthen pruning.gates.sparsity_warmup_steps"
        )
        if not_finite:
            raise TrainingDivergedError(
                f"step {step}: {', '.join(not_finite)} of the gates hold values that are no numbers. {knob}"
            )
        bad: dict[str, int] = {}
        for name, group in groups.items():
            for row, units in enumerate(group["expected_units"]):
                if group["target_units"] is None or units >= self.config.least_kept_share * group["target_units"]:
                    continue
                where = f"{name!r} in layer {row}" if len(group["expected_units"]) > 1 else f"{name!r}"
                bad[where] = self.bad_gates.get(where, 0) + 1
                if bad[where] >= self.config.sparsity_steps:
                    raise TrainingDivergedError(
                        f"step {step}: the gates of {where} expect to keep {units:g} of {group['size']} units, where "
                        f"their target leaves {group['target_units']:g}, and were below "
                        f"{self.config.least_kept_share:.0%} of that for {bad[where]} steps in a row. {knob}; where "
                        "this is no accident, set watchdog.least_kept_share lower"
                    )
        self.bad_gates = bad

    def to_json(self) -> dict[str, Any]:
        """What it remembers, as plain values."""
        return {"losses": self.losses, "bad_losses": self.bad_losses, "bad_gates": self.bad_gates}

    def load(self, value: dict[str, Any]) -> None:
        """The inverse of `to_json`."""
        self.losses, self.bad_losses, self.bad_gates = value["losses"], value["bad_losses"], value["bad_gates"]
