"""What a training step costs more with gates than without.

    python benchmarks/mask_overhead.py [--rounds N] [--sizes 0.2M 1.2M 6.4M] [--threads N] [--clock cpu|wall]

A step is forward, backward and AdamW in plain torch, float32. The gated step holds all there is: drawing gates,
setting them, their gradients, the Lagrangian, the gate optimiser. Models take turns within every round of one process,
so each ratio compares neighbours in time; medians over rounds with quartiles. The default, CPU seconds of one thread,
hardly sees what else runs on the machine; `again` is a second plain model, whose ratio is the noise. Three models of
equal weights:

    plain        no gates
    folded       gates as the project has them: folded into the weights of each pass
    activations  the same gates on activations, as the published implementation has them; only here, for comparison

Where it goes: `bookkeeping` replaces no forward, but draws, sets and optimises gates; `linears` and `norms` add to that
the gated output and down projections, or the gated norms and embedding.
Memory is the peak of all tensors held during a step, weights and optimiser state included, from torch's profiler,
which says on stderr when it starts and stops: `2>/dev/null`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from shearing.models.families import FAMILIES
from shearing.models.family import llama_config
from shearing.models.loading import new_model
from shearing.models.shape import Shape, TargetShape
from shearing.pruning.config import GatesConfig
from shearing.pruning.gates import Gates
from shearing.pruning.lagrangian import Lagrangian, build_gate_optimizer
from shearing.pruning.masks import ExpandedGates, GateSlots
from shearing.pruning.target import gate_groups, target_shape

VOCABULARY, SEQUENCES, TOKENS = 1000, 8, 256
SIZES = {"0.2M": (64, 4, 4, 172), "1.2M": (128, 8, 6, 344), "6.4M": (256, 8, 8, 688)}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
GOAL = {"time": 1.03, "memory": 1.10}


def shape_of_size(name: str) -> Shape:
    hidden, heads, layers, intermediate = SIZES[name]
    return Shape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        intermediate_size=intermediate,
    )


class ActivationSlots(GateSlots):
    """The same gates, multiplied into activations."""

    def _install(self, gates: ExpandedGates) -> None:
        family = self._family
        self._install_hidden(gates.hidden_D)
        out, head, inner = self._rows(gates.attention_LD), self._rows(gates.head_LI), self._rows(gates.intermediate_LF)
        for layer in range(self.shape.num_layers):
            for name, gate in ((family.output, head), (family.down, inner)):
                module = self._model.get_submodule(family.layer_module(layer, name))
                self._replace(module, partial(multiplied_linear, module, out[layer], gate[layer]))


def multiplied_linear(module: nn.Linear, out_O: Tensor, in_I: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x * in_I, module.weight) * out_O


class PartSlots(GateSlots):
    """Gates in some of their places only, to see what each place costs."""

    parts: tuple[str, ...] = ()

    def _install(self, gates: ExpandedGates) -> None:
        if "linears" in self.parts:
            super()._install(replace(gates, hidden_D=None))
        if "norms" in self.parts:
            self._install_hidden(gates.hidden_D)

    def gradients(self) -> dict[str, Tensor]:
        if {"linears", "norms"} <= set(self.parts):
            return super().gradients()
        return {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}


def part_slots(*parts: str) -> type[GateSlots]:
    return type("PartSlots", (PartSlots,), {"parts": parts})


class Step:
    """A model with its optimiser, and with gates unless `slots` is None."""

    def __init__(self, shape: Shape, slots: type[GateSlots] | None) -> None:
        self.model = new_model(llama_config(shape, VOCABULARY, TOKENS), seed=1).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(2))
        self.slots = None if slots is None else slots(self.model, FAMILIES["llama"])
        if self.slots is not None:
            asked = TargetShape(
                num_layers=shape.num_layers * 3 // 4,
                hidden_size=shape.hidden_size * 3 // 4,
                num_heads=shape.num_heads * 3 // 4,
                intermediate_size=shape.intermediate_size * 3 // 4,
            )
            groups = gate_groups(shape, target_shape(shape, asked))
            self.gates, self.lagrangian = Gates(groups), Lagrangian(groups, sparsity_warmup_steps=100)
            self.gate_optimizer = build_gate_optimizer(self.gates, self.lagrangian, GatesConfig(learning_rate=0.01))
        self.number = 0

    def run(self) -> None:
        if self.slots is not None:
            z = self.gates.sample(self.gates.noise(0, self.number))
            self.slots.set(z)
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.slots is not None:
            grads = self.slots.gradients()
            constraint = self.lagrangian.loss(self.gates.expected_sparsity(), self.number)
            torch.autograd.backward([constraint, *z.values()], [None, *(grads[name] for name in z)])
            self.gate_optimizer.step()
            self.gate_optimizer.zero_grad()
        self.number += 1


def seconds(step: Step, clock: Callable[[], float]) -> float:
    start = clock()
    step.run()
    return clock() - start


def peak_bytes(step: Step) -> int:
    """Most bytes of tensors held at once during a step."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in step.model.parameters())
    step.run()
    held *= 3  # weights and both moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def measure(name: str, rounds: int, clock: Callable[[], float]) -> None:
    shape = shape_of_size(name)
    steps = {
        "plain": Step(shape, None),
        "again": Step(shape, None),
        "folded": Step(shape, GateSlots),
        "activations": Step(shape, ActivationSlots),
        "bookkeeping": Step(shape, part_slots()),
        "linears": Step(shape, part_slots("linears")),
        "norms": Step(shape, part_slots("norms")),
    }
    for step in steps.values():
        seconds(step, clock)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    order = list(steps)
    for number in range(rounds):
        for variant in order[number % len(order) :] + order[: number % len(order)]:
            times[variant].append(seconds(steps[variant], clock))
    plain_peak = peak_bytes(steps["plain"])
    for variant, step in steps.items():
        ratios = [mine / plain for mine, plain in zip(times[variant], times["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        peak, fastest = peak_bytes(step), min(times[variant]) / min(times["plain"])
        print(
            f"{name:>5}  {variant:<12} {statistics.median(times[variant]) * 1e3:8.2f} ms  "
            f"x{middle:.3f} ({low:.3f} to {high:.3f})  x{fastest:.3f}  "
            f"{peak / 2**20:7.1f} MiB  x{peak / plain_peak:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{SEQUENCES} x {TOKENS} tokens, float32, {options.threads} threads, {options.clock} time")
    print("ratios to plain, step by step: median (quartiles); fastest to fastest; peak of tensors held")
    print(f"goals at 1.2M and 6.4M: time x{GOAL['time']:.2f}, memory x{GOAL['memory']:.2f}")
    for name in options.sizes:
        measure(name, options.rounds, CLOCKS[options.clock])


if __name__ == "__main__":
    main()
