"""The one training loop: mask learning with gates, continued pretraining and training from nothing without.

`training_reports` reads as the method does; what each line means stands in `Trainer`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from shearing.data.config import LossFrom
from shearing.data.mixing import MixState, epoch_starts
from shearing.data.mixture import MixtureState
from shearing.evaluation.losses import LossSums, domain_loss_sums
from shearing.training.batches import Batch, BatchStream, micro_batches_per_rank
from shearing.training.config import LoraConfig, TrainingConfig
from shearing.training.consumed import ConsumedSequences
from shearing.training.distillation import Teacher
from shearing.training.engine import Engine
from shearing.training.mask_learning import MaskLearner
from shearing.training.schedule import learning_rate
from shearing.training.step_clock import clock_for
from shearing.training.watchdog import Watchdog

Report = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What somebody asks of a phase while it runs: a checkpoint at once, and that the workers leave after the next."""

    save: bool = False
    leave: bool = False


def no_wish() -> Wish:
    """Nobody asks anything."""
    return Wish()


class MixtureClient(Protocol):
    """Whoever turns the losses of all ranks into the next proportions, the same answer for every rank."""

    def submit(self, step: int, base: MixtureState, sums: LossSums) -> MixtureState:
        """Hand in this rank's share of the loss sums at `step`; returns the version after `base`."""
        ...


@dataclass(frozen=True)
class TrainState:
    """Where a phase stands: all that a checkpoint holds besides tensors.

    `gathered` is what training batches said since the last mixture update, over all ranks: domain -> (sum of its
    sequences' mean losses in nats a token, sequences). The same on every rank.
    """

    step: int
    mix: MixState
    mixture: MixtureState
    gathered: LossSums = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        mixture = self.mixture.model_dump(mode="json")
        return {"step": self.step, "mix": self.mix.to_json(), "mixture": mixture, "gathered": self.gathered}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """The inverse of `to_json`."""
        mixture = MixtureState.model_validate(value["mixture"])
        gathered = {domain: (float(nats), int(count)) for domain, (nats, count) in value["gathered"].items()}
        return cls(value["step"], MixState.from_json(value["mix"]), mixture, gathered)


def training_reports(trainer: "Trainer") -> Iterator[Report]:
    """Run a phase from where it stands to its end, one report a step and one an evaluation."""
    if trainer.state.step == 0:
        yield trainer.evaluate(update=False)
    while not trainer.finished():
        batch = trainer.next_batch()
        trainer.open_gates()
        losses = trainer.forward_backward(batch)
        trainer.update_gates()
        yield from trainer.epoch_reports(batch)
        yield trainer.finish_step(batch, losses)
        if trainer.gathered_update_due():
            yield trainer.update_from_gathered()
        yield from trainer.extra_step_reports()
        if trainer.evaluation_due():
            yield trainer.evaluate(update=trainer.loss_from == "eval")


class Trainer:
    """One phase on one rank. Every rank calls every method in the same order."""

    def __init__(
        self,
        config: TrainingConfig,
        engine: Engine,
        *,
        stream: BatchStream,
        mixture: MixtureClient,
        held_out: dict[str, np.ndarray],
        references: dict[str, float],
        state: TrainState,
        watchdog: Watchdog,
        learner: MaskLearner | None = None,
        micro_batch_sequences: int = 1,
        loss_from: LossFrom = "eval",
        teacher: Teacher | None = None,
        lora: LoraConfig | None = None,
        ask: Callable[[], Wish] = no_wish,
    ) -> None:
        self.config, self.engine, self.stream, self.mixture = config, engine, stream, mixture
        self.held_out, self.references = held_out, references
        self.state, self.watchdog, self.learner, self.teacher = state, watchdog, learner, teacher
        self.lora, self.micro_batch_sequences = lora, micro_batch_sequences
        self.micro_batches = micro_batches_per_rank(stream.batch_sequences, stream.world, micro_batch_sequences)
        self.loss_from, self.ask, self.wish = loss_from, ask, Wish()
        self.update_every_steps = config.evaluate_every_steps
        if loss_from == "train":
            self.update_every_steps = config.update_mixture_every_steps or config.evaluate_every_steps
        self.consumed = ConsumedSequences(stream.splits)
        self.domains = list(stream.sequences)
        self.clock = clock_for(engine.device, stream.rank)
        self.evaluated_step = -1
        self.held_checkpoint = False

    def next_batch(self) -> Batch:
        """This step's batch, and the reading of the next ones gone on with where their proportions are settled."""
        self.clock.begin()
        step, proportions = self.state.step, self.state.mixture.proportions
        torch.manual_seed(self.stream.seed * 1_000_003 + step * 4099 + self.stream.rank)
        batch = self.stream.next(step, self.state.mix, proportions)
        self._mark_consumed(batch)
        self.stream.read_ahead(step + 1, batch.mix, proportions, self._settled_steps(step + 1))
        return batch

    def _settled_steps(self, step: int) -> int:
        """How many steps from this one on have the proportions of now; 0 where an update comes before it."""
        until_update = -step % self.update_every_steps
        return min(until_update, self.config.steps - step)

    def _mark_consumed(self, batch: Batch) -> None:
        places: dict[tuple[str, int], list[int]] = {}
        for row, draw in enumerate(batch.draws):
            epoch = draw.index // self.stream.sequences[draw.domain]
            places.setdefault((draw.domain, epoch), []).append(row)
        for (domain, epoch), rows in places.items():
            self.consumed.add(domain, epoch, batch.sequence_ids[rows])

    def open_gates(self) -> None:
        """Draw the gates of this step, in mask learning."""
        if self.learner:
            self.learner.open(self.state.step)

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """Gradients and the weights' update.

        Returns [domains, 3]: this rank's sums over its sequences of the cross-entropy in nats a token, of one, and of
        the divergence from the teacher (0 without one).
        """
        self.clock.begin_forward()
        sums = torch.zeros(len(self.domains), 3, dtype=torch.float64, device=self.engine.device)
        self.engine.begin_update(learning_rate(self.config, self.state.step))
        self.engine.model.train()
        count, whole = self.micro_batches, self.stream.batch_sequences
        for draws, mine_BT in batch.micro_batches(self.micro_batch_sequences, count):
            # a rank that has no sequence left goes along all the same: the others' collectives wait for it
            host_tokens_BT = mine_BT if draws else mine_BT.new_zeros(1, mine_BT.shape[1])
            tokens_BT = host_tokens_BT.to(self.engine.device, non_blocking=True)
            logits_BTV = self.engine.logits(tokens_BT)
            loss_B = sequence_losses(logits_BTV, tokens_BT)
            divergence_B = torch.zeros_like(loss_B)
            loss = loss_B.mean()
            if self.teacher:
                divergence_B = self.teacher.divergences(logits_BTV, tokens_BT)
                loss = self.teacher.blend(loss, divergence_B.mean())
            # the engine takes the mean over ranks and micro-batches; every sequence has to count alike in it
            share = len(draws) * count * self.stream.world / whole
            self.engine.accumulate(loss * share, self.clock.begin_update)
            domains = [self.domains.index(draw.domain) for draw in draws]
            domain_B = torch.tensor(domains, dtype=torch.long).to(sums.device, non_blocking=True)
            rows_B3 = torch.stack([loss_B.detach(), torch.ones_like(loss_B), divergence_B.detach()], dim=1).double()
            # on the device: reading a loss here would wait for it
            sums.index_add_(0, domain_B, rows_B3[: len(draws)])
        return sums

    def update_gates(self) -> None:
        """One step of gates and multipliers, in mask learning."""
        if self.learner:
            self.learner.update(self.state.step)

    def finish_step(self, batch: Batch, sums: torch.Tensor) -> Report:
        """Count the step, and say what it did. Raises TrainingDivergedError where the watchdog stops the phase."""
        wish = self.ask()
        asked = torch.tensor([[wish.save, wish.leave, 0]]).to(sums)  # with the losses: ranks agree at no cost
        summed = torch.cat([sums, asked])
        dist.all_reduce(summed)
        *_, (save, leave, _) = summed.tolist()
        self.wish, total = Wish(save > 0, leave > 0), summed[:-1].cpu()
        seconds = self.clock.end(batch.wait_s)
        loss = float(total[:, 0].sum() / total[:, 1].sum())
        rate, norm = learning_rate(self.config, self.state.step), self.engine.gradient_norm()
        self.watchdog.see_loss(self.state.step, loss, norm, self.config.learning_rate)
        proportions = self.state.mixture.proportions
        step = self.state.step + 1
        report: Report = {
            "kind": "step",
            "step": step,
            "time": time.time(),
            "tokens": step * self.config.global_batch_tokens,
            "loss": loss,
            "losses": {d: s / n for d, (s, n, _) in zip(self.domains, total.tolist(), strict=True) if n},
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_s": self.config.global_batch_tokens / seconds["step_s"],
            **seconds,
            "proportions": proportions,
            "drawn": batch.mix.drawn,
        }
        if self.teacher:
            report["divergence"] = float(total[:, 2].sum() / total[:, 1].sum())
        if self.learner:
            report.update(self.learner.report(self.state.step))
            not_finite, rate = self.learner.not_finite(), self.learner.config.gates.learning_rate
            self.watchdog.see_gates(self.state.step, not_finite, report["sparsity"], rate)
        gathered = self._gathered(total) if self.loss_from == "train" else {}
        self.state = replace(self.state, step=step, mix=batch.mix, gathered=gathered)
        return report

    def _gathered(self, total: torch.Tensor) -> LossSums:
        """What was gathered since the last update and this step's sums [domains, 3], already those of all ranks."""
        sums = dict(self.state.gathered)
        for domain, (nats, count, _) in zip(self.domains, total.tolist(), strict=True):
            if count:
                before = sums.get(domain, (0.0, 0))
                sums[domain] = (before[0] + nats, before[1] + int(count))
        return sums

    def gathered_update_due(self) -> bool:
        """Whether the losses of the training batches since the last update move the proportions now."""
        return self.loss_from == "train" and self.state.step % self.update_every_steps == 0

    def update_from_gathered(self) -> Report:
        """Move the proportions of the steps after by what training batches said; costs no forward pass."""
        # all ranks hold the sums of all: one hands them in, the others nothing
        mine = self.state.gathered if self.stream.rank == 0 else {}
        share = {domain: mine.get(domain, (0.0, 0)) for domain in self.domains}
        mixture = self.mixture.submit(self.state.step, self.state.mixture, share)
        sequences = {domain: count for domain, (_, count) in self.state.gathered.items()}
        self.state = replace(self.state, mixture=mixture, gathered={})
        return {
            "kind": "mixture",
            "step": self.state.step,
            "time": time.time(),
            "losses": mixture.losses,
            "sequences": sequences,
            "references": self.references,
            "proportions": mixture.proportions,
            "version": mixture.version,
        }

    def epoch_reports(self, batch: Batch) -> Iterator[Report]:
        """One event for each domain that began to repeat in this batch."""
        for start in epoch_starts(self.state.mix, batch.mix, self.stream.sequences):
            text = f"{start.domain} begins epoch {start.epoch + 1}: its text is repeated from here"
            yield event_report(self.state.step + 1, "next_epoch", text)

    def finished(self) -> bool:
        """Whether the phase is at its end: in mask learning it may go on until its gates are within tolerance."""
        step = self.state.step
        if step < self.config.steps:
            return False
        return step >= self.config.most_steps or self.learner is None or self.learner.converged()

    def extra_step_reports(self) -> Iterator[Report]:
        """What is said where the regular steps end and the phase goes on."""
        if self.learner and self.state.step == self.config.steps and not self.finished():
            missed = "; ".join(self.learner.outcome()["missed"])
            extra = self.config.most_steps - self.config.steps
            text = f"goes on for at most {extra:,} steps with a rising penalty, since {missed}"
            yield event_report(self.state.step, "extra_steps", text)

    def evaluation_due(self) -> bool:
        """Whether an evaluation follows the step just made."""
        return self.state.step % self.config.evaluate_every_steps == 0 or self.finished()

    def settled(self, report: Report) -> bool:
        """Whether `report` is the last of its step, so that the state may be saved."""
        last = "evaluation" if self.evaluation_due() else "mixture" if self.gathered_update_due() else "step"
        return bool(report["kind"] == last)

    def checkpoint_due(self) -> bool:
        """Whether the state after the step just made is to be saved; to be asked once a step.

        A checkpoint that falls on a step that the watchdog finds bad waits for the next good one.
        """
        step = self.state.step
        due = step > 0 and (step % self.config.checkpoint_every_steps == 0 or self.finished() or self.wish.save)
        due, held = due or self.held_checkpoint, self.watchdog.suspicious and not self.finished()
        self.held_checkpoint = due and held
        return due and not held

    def require_sound(self) -> None:
        """Raise TrainingDivergedError where the weights as they are now are not worth keeping (collective).

        The loss of a step is of the weights before its update. Where no evaluation has followed, one micro-batch of
        each domain's held-out text tells.
        """
        if self.evaluated_step != self.state.step:
            self._held_out_losses({d: held_out[: self.micro_batch_sequences] for d, held_out in self.held_out.items()})

    def _held_out_losses(self, held_out: dict[str, np.ndarray]) -> tuple[LossSums, dict[str, float]]:
        """This rank's loss sums, and the loss per domain over all ranks, which the watchdog has seen (collective)."""
        if self.learner:
            self.learner.close()
        sums = domain_loss_sums(
            self.engine.model,
            held_out,
            self.micro_batch_sequences,
            self.engine.device,
            rank=self.stream.rank,
            world=self.stream.world,
            forward=self.engine.logits,
        )
        losses = summed_losses(sums, self.engine.device)
        # in the proportions of the batches, whose losses the watchdog knows; one domain's NaN is the mixture's matter
        shares = {d: self.state.mixture.proportions[d] for d, loss in losses.items() if math.isfinite(loss)}
        drawn = sum(shares.values())  # 0 where all that is trained on has no loss that is a number
        mean = sum(share * losses[d] for d, share in shares.items()) / drawn if drawn else math.nan
        self.watchdog.see_held_out(self.state.step, mean, self.config.learning_rate)
        return sums, losses

    def evaluate(self, update: bool) -> Report:
        """Held-out loss per domain; with `update` it moves the proportions of the steps after."""
        began_s = time.perf_counter()
        sums, losses = self._held_out_losses(self.held_out)
        self.evaluated_step = self.state.step
        measured_s = time.perf_counter()
        if update:
            self.state = replace(self.state, mixture=self.mixture.submit(self.state.step, self.state.mixture, sums))
        return {
            "kind": "evaluation",
            "step": self.state.step,
            "time": time.time(),
            "losses": losses,
            "references": self.references,
            "proportions": self.state.mixture.proportions,
            "version": self.state.mixture.version,
            "seconds": time.perf_counter() - began_s,
            "mixture_wait_s": time.perf_counter() - measured_s,
        }


def event_report(step: int, event: str, text: str) -> Report:
    """Something that happened once, for the log."""
    return {"kind": "event", "step": step, "time": time.time(), "event": event, "text": text}


def checkpoint_report(step: int, name: str, seconds: float) -> Report:
    """A checkpoint that is on storage, whole."""
    return {"kind": "checkpoint", "step": step, "time": time.time(), "name": name, "seconds": seconds}


def sequence_losses(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss [B] of each sequence in nats a token, computed in float32."""
    logits = logits_BTV[:, :-1].float().flatten(0, 1)
    loss = functional.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="none")
    return loss.view(tokens_BT.shape[0], -1).mean(dim=1)


def summed_losses(sums: LossSums, device: torch.device) -> dict[str, float]:
    """Loss per domain in nats a token over the shares of all ranks (collective)."""
    total = torch.tensor([sums[domain] for domain in sums], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return {domain: float(s / n) for domain, (s, n) in zip(sums, total.tolist(), strict=True)}
