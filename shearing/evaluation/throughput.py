"""How fast a model answers and what it takes: prefill, decoding, memory, disk, parameters.

Shapes: B sequences, T tokens, V vocabulary.
"""

import ctypes
import gc
import inspect
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from shearing.evaluation.losses import evaluation_mode

CLEAR_PEAK = "5"  # proc(5): resets the peak resident set size of a process
NOT_PRUNABLE = ("embed", "lm_head", "norm", "ln_", "embed_out", "wte", "wpe")


@dataclass(frozen=True)
class Load:
    """What is asked of a model: `batch_sequences` prompts of `prompt_tokens`, each continued by `decode_tokens`."""

    prompt_tokens: int
    decode_tokens: int
    batch_sequences: int = 1


@dataclass(frozen=True)
class Rate:
    """Tokens a second over repeats: the median, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second of reading prompts and of writing continuations, over the whole batch."""

    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate


def measure_speeds(
    models: Mapping[str, nn.Module], load: Load, device: torch.device | str, repeats: int = 5
) -> dict[str, Speed]:
    """Speeds of several models, taken in turns, so that a noisy machine treats all of them alike.

    One round is warm-up. In every further round each model answers once, in an order that is turned round each time.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(-1, repeats):
        names = list(models) if turn % 2 == 0 else list(reversed(list(models)))
        for name in names:
            taken = answer(models[name], load, device)
            if turn >= 0:
                seconds[name].append(taken)
    prompt, written = load.batch_sequences * load.prompt_tokens, load.batch_sequences * load.decode_tokens
    return {
        name: Speed(_rate([prompt / pair[0] for pair in taken]), _rate([written / pair[1] for pair in taken]))
        for name, taken in seconds.items()
    }


def answer(model: nn.Module, load: Load, device: torch.device | str) -> tuple[float, float]:
    """Seconds of one prefill, and of the greedy decoding after it with a key-value cache."""
    config: Any = model.config
    vocabulary = int(config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (load.batch_sequences, load.prompt_tokens), generator=generator).to(device)
    last_only: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        last_only["logits_to_keep"] = 1  # what a server computes: the other positions' logits are never read
    with evaluation_mode(model), torch.inference_mode():
        started = _now(device)
        output = model(input_ids=ids_BT, use_cache=True, **last_only)
        read = _now(device)
        for _ in range(load.decode_tokens):
            next_B1 = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)
        return read - started, _now(device) - read


def peak_memory_bytes(load_model: Callable[[], nn.Module], load: Load, device: torch.device | str) -> int:
    """The most memory a model takes while it answers: weights, key-value cache and activations.

    CUDA: the allocator's own peak. CPU: the growth of the process's resident memory over what it was before the
    weights were loaded; call it in a fresh process that has loaded and run the same model once before, so that
    libraries and thread pools are not counted. Loading itself, which may hold the weights twice, is left out.
    """
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        model = load_model()
        torch.cuda.reset_peak_memory_stats(device)
        answer(model, load, device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    _release_freed_memory()
    before = psutil.Process().memory_info().rss
    model = load_model()
    _release_freed_memory()
    with _peak_resident() as peak:
        answer(model, load, device)
    return max(peak) - before


def parameter_count(model: nn.Module) -> int:
    """Every parameter once: a head tied to the embedding adds nothing."""
    return sum(parameter.numel() for parameter in model.parameters())


def prunable_parameter_count(model: nn.Module) -> int:
    """Parameters without embeddings, head and norms: what sparsity in the literature refers to."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(mark in part for part in name.split(".") for mark in NOT_PRUNABLE)
    )


def disk_bytes(folder: str | Path) -> int:
    """Bytes of all files of a Hugging Face directory."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _rate(values: list[float]) -> Rate:
    if len(values) < 2:
        return Rate(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Rate(median, lower, upper)


def _now(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _release_freed_memory() -> None:
    """Give freed memory back to the system, or a second model would move into the first one's pages unseen."""
    gc.collect()
    if sys.platform == "linux":
        # another C library than glibc: the figure may come out too low by what that one keeps
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _peak_resident() -> Iterator[list[int]]:
    """Yields a list whose largest value is, afterwards, the peak resident memory in between, in bytes."""
    process = psutil.Process()
    peak = [process.memory_info().rss]
    kernel_counts = _clear_peak()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak.append(process.memory_info().rss)

    sampler = None
    if not kernel_counts:
        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
    try:
        yield peak
    finally:
        done.set()
        if sampler is not None:
            sampler.join()
        peak.append(process.memory_info().rss)
        if kernel_counts:
            peak.append(_kernel_peak())


def _clear_peak() -> bool:
    """Whether the kernel counts this process's peak anew from here on."""
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        return _kernel_peak() > 0
    except OSError:
        return False


def _kernel_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
