"""Decoder models whose layers have numbers of heads and intermediate units of their own, or lack attention or MLP.

This file is copied beside such a model's weights, so that `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` finds it; it needs transformers alone. The config names a stock architecture, and under
`uneven` what each layer has. Every module is that architecture's own: the stock model is built, and each layer gives
way to one of the same class at its own sizes. The configs of transformers 5.23 have `per_layer_config`, but its Llama
and Qwen refuse numbers of heads and intermediate sizes there, and build what a layer should `skip` all the same.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn


class AbsentAttention(nn.Module):
    """Attention that a layer does not have: it adds nothing."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *_args: Any, past_key_values: Any = None, **_options: Any
    ) -> tuple[torch.Tensor, None]:
        """Zeros. A cache learns how many tokens have passed, since it may ask any layer for that."""
        if past_key_values is not None:
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(passed, passed, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """An MLP that a layer does not have: it adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


class Uneven:
    """Gives the layers of a stock model, the next class in line, the sizes that its config lists."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        description = config.uneven
        layers = self.get_submodule(description["path"])  # type: ignore[attr-defined]
        for index, sizes in enumerate(description["layers"]):
            layer_config = copy.deepcopy(config)
            for key, size in sizes.items():
                if key != "skip":
                    setattr(layer_config, key, size)
            layer = type(layers[index])(layer_config, index)
            for half in sizes.get("skip", []):
                names = description["modules"][half]
                setattr(layer, names[0], AbsentAttention(index) if half == "attention" else AbsentMLP())
                for norm in names[1:]:
                    setattr(layer, norm, nn.Identity())
            layers[index] = layer
        self.post_init()  # type: ignore[attr-defined]


def __getattr__(name: str) -> type:
    """`Uneven` before the name of a stock class, as in `UnevenLlamaForCausalLM`."""
    if not name.startswith("Uneven"):
        raise AttributeError(name)
    stock = getattr(transformers, name.removeprefix("Uneven"))
    made = type(name, (Uneven, stock), {"__module__": __name__, "__doc__": f"{stock.__name__} with uneven layers."})
    globals()[name] = made
    return made
