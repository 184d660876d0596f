"""Decoder models whose residual stream was rotated and sliced (SliceGPT, arXiv 2401.15024).

This file is copied beside such a model's weights, so that `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` finds it; it needs torch and transformers alone. The config names a stock architecture, and
under `sliced` the modules and the sizes of every signal. Attention and MLP are that architecture's own modules with
linear layers of other sizes: the stock model is built, its norms become bare ones that divide by the unsliced size, and
each layer turns what it was given by a matrix of its own before it adds to it.

Shape suffixes: B batch, T tokens, D a signal's size.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn


class BareNorm(nn.Module):
    """Root-mean-square norm without a weight, over a signal that had `size` dimensions before it was sliced."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.size, self.epsilon = size, epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same direction, scaled; in float32 or wider, and rounded once."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean_square = wide.pow(2).sum(-1, keepdim=True) / self.size
        return (wide * torch.rsqrt(mean_square + self.epsilon)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.size}, epsilon={self.epsilon}"


class SlicedLayer:
    """What a sliced decoder layer does; the stock layer's class comes next in line, its modules stay where they are."""

    names: Mapping[str, Any]

    def attend(self, normed_BTD: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """What attention adds, of a signal that was normed."""
        attention = getattr(self, self.names["attention"])
        return self._dropped(0, attention(hidden_states=normed_BTD, **options)[0])

    def feed(self, normed_BTD: torch.Tensor) -> torch.Tensor:
        """What the MLP adds, of a signal that was normed."""
        for name in self.names["mlp"]:
            normed_BTD = getattr(self, name)(normed_BTD)
        return self._dropped(1, normed_BTD)

    def norm(self, half: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """What `attention` or `mlp` reads of a signal."""
        return getattr(self, self.names[f"{half}_norm"])(hidden_states)

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """The next signal; options are the stock layer's."""
        normed = self.norm("attention", hidden_states)
        attended = self.attend(normed, options)
        if self.names["parallel"]:
            return hidden_states @ self.residual + attended + self.feed(normed)  # type: ignore[attr-defined]
        middle = hidden_states @ self.attention_residual + attended  # type: ignore[attr-defined]
        return middle @ self.mlp_residual + self.feed(self.norm("mlp", middle))  # type: ignore[attr-defined]

    def _dropped(self, half: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.names["dropouts"]:
            return hidden_states
        dropout = getattr(self, self.names["dropouts"][half])
        if isinstance(dropout, nn.Module):
            return dropout(hidden_states)
        return nn.functional.dropout(hidden_states, dropout, self.training)  # type: ignore[attr-defined]


def slice_layer(layer: nn.Module, names: Mapping[str, Any], sizes: Mapping[str, Any], size: int) -> None:
    """Makes a sliced layer of a stock one, in place; every linear layer is new, with the type and device of the old.

    Args:
        layer: Of the stock architecture.
        names: Its modules, as a sliced model's config has them under `names`.
        sizes: By module, what each reader reads and each writer puts out; under `residuals` the rows and columns of
            the matrices that turn the residual stream.
        size: Of every signal before it was sliced.
    """
    for name, inputs in sizes["readers"].items():
        _resize(layer, name, inputs=inputs, bias=names["reader_bias"])
    for name, outputs in sizes["writers"].items():
        _resize(layer, name, outputs=outputs)
    for name in sorted({names["attention_norm"], names["mlp_norm"]}):
        layer.set_submodule(name, BareNorm(size, getattr(layer.get_submodule(name), names["norm_epsilon"])))
    weight = next(layer.parameters())
    for name, shape in sizes["residuals"].items():
        matrix = torch.eye(*shape, dtype=weight.dtype, device=weight.device)
        layer.register_parameter(name, nn.Parameter(matrix))
    stock = type(layer)
    # the name of the stock class, by which placement and wrapping policies know a layer
    made: Any = type(stock.__name__, (SlicedLayer, stock), {"__module__": __name__, "__doc__": SlicedLayer.__doc__})
    layer.__class__ = made
    layer.names = names  # type: ignore[assignment]


def _resize(
    parent: nn.Module, name: str, *, inputs: int | None = None, outputs: int | None = None, bias: bool = False
) -> None:
    old: Any = parent.get_submodule(name)
    made = nn.Linear(
        inputs or old.in_features,
        outputs or old.out_features,
        bias=bias or old.bias is not None,
        dtype=old.weight.dtype,
        device=old.weight.device,
    )
    parent.set_submodule(name, made)


class Sliced:
    """Gives a stock model, the next class in line, the sizes that its config lists."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        model: Any = self
        description = config.sliced
        names, first, last = description["names"], description["first"], description["last"]
        for name in names["embeddings"]:
            table = model.get_submodule(name)
            table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, first))
            table.embedding_dim, table._is_hf_initialized = first, False  # so that it gets fresh weights again
        for layer, sizes in zip(model.get_submodule(names["layers"]), description["layers"], strict=True):
            slice_layer(layer, names, sizes, description["size"])
        epsilon = getattr(model.get_submodule(names["final_norm"]), names["norm_epsilon"])
        model.set_submodule(names["final_norm"], BareNorm(description["size"], epsilon))
        _resize(model, names["head"], inputs=last, bias=names["reader_bias"])
        model.post_init()


def __getattr__(name: str) -> type:
    """`Sliced` before the name of a stock class, as in `SlicedLlamaForCausalLM`."""
    if not name.startswith("Sliced"):
        raise AttributeError(name)
    stock = getattr(transformers, name.removeprefix("Sliced"))
    made = type(name, (Sliced, stock), {"__module__": __name__, "__doc__": f"{stock.__name__}, sliced."})
    globals()[name] = made
    return made
