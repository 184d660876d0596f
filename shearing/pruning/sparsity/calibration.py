"""A share of the calibration text on its way through a model whose layers become sparse one after another.

A plain class that knows nothing of others: whoever leads sums what the shares return, prunes, and tells them to go on.
Shape suffixes: N sequences, B a batch of them, T tokens, D hidden, I input size of a linear layer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearing.models.layerwise import LayerwiseModel

# Sums of 2 x x' over all tokens, float64 [I, I]; each under the names of the linear layers that read the same x.
Hessians = dict[tuple[str, ...], Tensor]


def add_hessians(parts: Sequence[Hessians]) -> Hessians:
    """The sums of several shares as one."""
    total = {names: hessian_II.clone() for names, hessian_II in parts[0].items()}
    for part in parts[1:]:
        assert part.keys() == total.keys(), "shares of one model at one layer"
        for names, hessian_II in part.items():
            total[names] += hessian_II
    return total


def text_digest(tokens_NT: Tensor, attention_mask_NT: Tensor | None = None) -> str:
    """A name for the whole calibration text, however many shares it is cut into."""
    mask = b"" if attention_mask_NT is None else attention_mask_NT.to(torch.uint8).numpy().tobytes()
    return hashlib.sha256(tokens_NT.to(torch.int64).numpy().tobytes() + mask).hexdigest()[:16]


class CalibrationShare:
    """Hidden states of some calibration sequences; one layer is in memory at a time.

    Args:
        folder: The source model's directory.
        tokens_NT: Token ids.
        attention_mask_NT: 1 for tokens, 0 for padding, which no Hessian sees; None without padding.
        batch_sequences: Sequences that run through a layer at once.
        dtype: Of weights and hidden states.
        device: Where they are.
    """

    def __init__(
        self,
        folder: str | Path,
        tokens_NT: Tensor,
        attention_mask_NT: Tensor | None = None,
        *,
        batch_sequences: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._model = LayerwiseModel(folder, dtype, device)
        self._tokens_NT, self._mask_NT = tokens_NT, attention_mask_NT
        starts = range(0, len(tokens_NT), batch_sequences)
        self._batches = [slice(start, start + batch_sequences) for start in starts]
        self._hidden: list[Tensor] = []
        self._layer: tuple[int, nn.Module] | None = None

    def embed(self) -> None:
        """Go to what the first layer reads."""
        embedding = self._model.embedding()
        self._hidden = [embedding(self._tokens_NT[rows], self._mask_of(rows)) for rows in self._batches]

    @torch.no_grad()
    def hessians(self, layer: int) -> Hessians:
        """Sums over the inputs of every linear layer in a decoder layer, whose own weights are still the source's.

        Products are taken in the share's type, a batch at a time, and added up in float64.
        """
        module = self._read(layer)
        watch = _Watch({name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)})
        for number, rows in enumerate(self._batches):
            watch.mask_BT = self._mask_of(rows)
            with watch:
                self._run(module, layer, number)
        return watch.hessians()

    @torch.no_grad()
    def follow(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Go past a decoder layer that has the given weights, by name in the layer, in place of its own."""
        module = self._read(layer)
        for name, weight in weights.items():
            linear: Any = module.get_submodule(name)
            linear.weight.copy_(weight)
        for number in range(len(self._batches)):
            self._hidden[number] = self._run(module, layer, number)
        self._layer = None

    def _read(self, layer: int) -> nn.Module:
        if self._layer is None or self._layer[0] != layer:
            self._layer = None  # before the next one is read
            self._layer = (layer, self._model.layer(layer))
        return self._layer[1]

    def _run(self, module: nn.Module, layer: int, number: int) -> Tensor:
        hidden_BTD, rows = self._hidden[number], self._batches[number]
        return module(hidden_BTD, **self._model.layer_options(hidden_BTD, self._mask_of(rows))[layer])

    def _mask_of(self, rows: slice) -> Tensor | None:
        return None if self._mask_NT is None else self._mask_NT[rows]


class _Watch:
    """Sums what goes into linear layers while it is entered."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self.mask_BT: Tensor | None = None
        self._linears = linears
        self._readers: dict[str, list[str]] = {}  # of the input that the first of them is given
        self._sums: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}  # of one forward pass
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._inputs = {}
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(partial(self._see, name)))

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs = [], {}

    def hessians(self) -> Hessians:
        """All sums."""
        return {tuple(self._readers[name]): total_II.cpu() for name, total_II in self._sums.items()}

    def _see(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for first, seen in self._inputs.items():
            if args[0] is seen:  # as queries, keys and values read one tensor
                if name not in self._readers[first]:
                    self._readers[first].append(name)
                return
        self._inputs[name] = args[0]
        self._readers.setdefault(name, [name])
        x_SI = args[0].flatten(0, -2)
        if self.mask_BT is not None:
            x_SI = x_SI[self.mask_BT.flatten().to(x_SI.device) == 1]
        x_SI = x_SI.float()  # bfloat16 would keep eight bits of each sum, and leave no positive definite matrix
        product_II = (x_SI.T @ x_SI).double()
        total_II = self._sums.get(name)
        self._sums[name] = 2 * product_II if total_II is None else total_II.add_(product_II, alpha=2)
