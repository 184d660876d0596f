"""Held-out loss per domain.

Shapes: N sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Forward = Callable[[torch.Tensor], torch.Tensor]
LossSums = dict[str, tuple[float, int]]

FLOAT32_LOGITS_AT_ONCE = 2**24  # 64 MiB: a whole batch in float32 would outweigh the model that made it


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and its like off inside, and every module's own mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def domain_loss_sums(
    model: nn.Module,
    sequences: Mapping[str, np.ndarray],
    batch_sequences: int,
    device: torch.device | str,
    *,
    rank: int = 0,
    world: int = 1,
    forward: Forward | None = None,
) -> LossSums:
    """Next-token loss of this rank's share, per domain: (sum in nats, predicted tokens); sums of all ranks add up.

    Each sequence of T tokens predicts T - 1 of them; nothing stands before the first. Batches do not depend on
    `world`, so the sums of all ranks are the same for any number of them. Every rank makes the same number of
    forward passes, because under ZeRO-3 each pass gathers weights from all ranks: short ranks repeat a batch
    that counts for nothing.

    Args:
        model: Whose modules go to evaluation mode meanwhile; called as `model(input_ids=..., use_cache=False)`.
        sequences: domain -> token ids [N, T], the same on every rank.
        batch_sequences: Sequences of one forward pass.
        device: Where the forward pass runs.
        rank: Of this process.
        world: Number of processes that share the work.
        forward: ids_NT -> logits_NTV, in place of calling `model`.

    Raises:
        ValueError: A domain is not [N >= 1, T >= 2], or `batch_sequences` is below 1.
    """
    batches = _batches(sequences, batch_sequences)
    call = forward or (lambda ids_NT: model(input_ids=ids_NT, use_cache=False).logits)
    sums: LossSums = dict.fromkeys(sequences, (0.0, 0))
    with evaluation_mode(model), torch.no_grad():  # not inference_mode: DeepSpeed writes to what it gathers
        for turn in range(math.ceil(len(batches) / world)):
            position = turn * world + rank
            domain, tokens_NT = batches[position % len(batches)]
            ids_NT = torch.from_numpy(tokens_NT.astype(np.int64)).to(device)
            logits_NTV = call(ids_NT)
            if position < len(batches):
                total, count = sums[domain]
                sums[domain] = (total + loss_sum(logits_NTV, ids_NT), count + ids_NT[:, 1:].numel())
    return sums


def mean_losses(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Nats a token per domain. Raises ValueError for a domain without a token."""
    empty = [domain for domain, (_, tokens) in sums.items() if tokens == 0]
    if empty:
        raise ValueError(f"no token was evaluated in {', '.join(empty)}")
    return {domain: total / tokens for domain, (total, tokens) in sums.items()}


def loss_sum(logits_NTV: torch.Tensor, ids_NT: torch.Tensor) -> float:
    """Sum of the next-token loss in nats: float32 logits a few rows at a time, added up in float64."""
    rows_at_once = max(1, FLOAT32_LOGITS_AT_ONCE // logits_NTV.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits_NTV.device)
    for logits_TV, ids_T in zip(logits_NTV, ids_NT, strict=True):
        for start in range(0, len(ids_T) - 1, rows_at_once):
            stop = min(start + rows_at_once, len(ids_T) - 1)
            loss_T = functional.cross_entropy(
                logits_TV[start:stop].float(), ids_T[start + 1 : stop + 1], reduction="none"
            )
            total += loss_T.double().sum()
    return float(total)


def perplexity(loss: float) -> float:
    """exp(loss), the loss in nats a token; infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _batches(sequences: Mapping[str, np.ndarray], batch_sequences: int) -> list[tuple[str, np.ndarray]]:
    if batch_sequences < 1:
        raise ValueError(f"batch_sequences = {batch_sequences}; it has to be at least 1")
    batches = []
    for domain, tokens_NT in sequences.items():
        if tokens_NT.ndim != 2 or tokens_NT.shape[0] < 1 or tokens_NT.shape[1] < 2:
            raise ValueError(f"{domain}: token ids have shape {tokens_NT.shape}; needed: [sequences >= 1, tokens >= 2]")
        for start in range(0, len(tokens_NT), batch_sequences):
            batches.append((domain, tokens_NT[start : start + batch_sequences]))
    return batches
