"""A model directory one part at a time: embedding, decoder layers one after another, final norm and head.

The family's stock model is built without weights, and its own forward is run with catchers in place of its layers. So
positions, scaled embeddings, masks of padding and of windows, and rotary embeddings are the family's, whatever it is;
memory is one part's. Shape suffixes: B batch, T tokens, D hidden, V vocabulary.
"""

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearing.errors import UserError
from shearing.models.family import check_config, family_of, is_tied, shape_of
from shearing.models.loading import StoredTensors, blank_model, read_config

LayerOptions = dict[str, Any]


class _Catcher(nn.Module):
    """Stands in a layer's place: keeps what the layer is called with, and passes hidden states on, or others."""

    def __init__(self) -> None:
        super().__init__()
        self.options: LayerOptions = {}
        self.instead_BTD: Tensor | None = None

    def forward(self, hidden_BTD: Tensor, **options: Any) -> Tensor:
        """The hidden states as they are, or those given instead."""
        self.options = options
        return hidden_BTD if self.instead_BTD is None else self.instead_BTD


class _NoPositions(nn.Module):
    """In place of learned positions where the hidden states of the embedding are not asked for."""

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        """Nothing to add."""
        return torch.zeros(1)


class Embedding:
    """Embedding and learned positions of a model; holds their tables as long as it lives."""

    def __init__(self, model: "LayerwiseModel") -> None:
        family = model.family
        names = [name for name in (family.embedding, family.positions) if name is not None]
        self._model, self._parts = model, {name: model.materialised(name) for name in names}

    def __call__(self, tokens_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """What the first layer reads, [B, T, D].

        Args:
            tokens_BT: Token ids.
            attention_mask_BT: 1 for tokens, 0 for padding; None without padding.
        """
        parts = self._parts | {self._model.family.final_norm: nn.Identity()}
        place = self._model.placed
        with self._model.in_place(parts) as whole:
            found = whole.base_model(
                input_ids=place(tokens_BT), attention_mask=place(attention_mask_BT), use_cache=False
            )
        return found.last_hidden_state


class Tail:
    """Final norm and LM head of a model; holds them as long as it lives."""

    def __init__(self, model: "LayerwiseModel") -> None:
        family = model.family
        self._model = model
        self._parts = {name: model.materialised(name) for name in (family.final_norm, family.lm_head)}

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of what the last layer put out."""
        with self._model.in_place(self._parts) as whole, self._model.passing_on(hidden_BTD):
            return whole(inputs_embeds=hidden_BTD, use_cache=False).logits


class LayerwiseModel:
    """The parts of a causal language model in a directory, each read from its files when asked for.

    Args:
        folder: A Hugging Face directory of a registered family, weights in safetensors, whole or in shards.
        dtype: Of the weights handed out.
        device: Of the parts handed out.

    Attributes:
        config: Its config.json.
        family: Its family.
        num_layers: Number of decoder layers.

    Raises:
        UserError: Not such a directory, or a variant that cannot be pruned.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.config: dict[str, Any] = read_config(folder)
        self.family = family_of(self.config)
        problems = check_config(self.config)
        if problems:
            raise UserError(problems)
        self.num_layers = shape_of(self.config).num_layers
        self.device = torch.device(device)
        self.tensors = StoredTensors(folder)
        self._whole: Any = blank_model(self.config, dtype)
        self._layers = list(self._whole.get_submodule(self.family.layers).children())
        self._catchers = nn.ModuleList(_Catcher() for _ in self._layers)
        self._whole.set_submodule(self.family.layers, self._catchers)
        held = {self.family.embedding, self.family.positions, self.family.final_norm, self.family.lm_head}
        for name, module in self._whole.named_modules():  # what is left: rotary embeddings, which have no weights
            if name not in held and list(module.buffers(recurse=False)):
                self._fill(module, "")

    def embedding(self) -> Embedding:
        """Embedding and learned positions."""
        return Embedding(self)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer in evaluation mode; `layer(hidden_BTD, **layer_options(...)[index])` is what it puts out."""
        return self._fill(self.blank_layer(index), self.family.layer_module(index, ""))

    def blank_layer(self, index: int) -> nn.Module:
        """A decoder layer without weights, on the meta device."""
        return copy.deepcopy(self._layers[index])

    def linears(self, index: int) -> list[str]:
        """Names of the linear layers in a decoder layer; nothing is read."""
        return [name for name, part in self._layers[index].named_modules() if isinstance(part, nn.Linear)]

    def tail(self) -> Tail:
        """Final norm and LM head."""
        return Tail(self)

    def layer_options(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None = None) -> list[LayerOptions]:
        """The keyword arguments that the model calls each of its layers with: masks, positions, rotary embeddings.

        Args:
            hidden_BTD: Of the batch; only its shape, type and device count, not its size D.
            attention_mask_BT: 1 for tokens, 0 for padding; None without padding.
        """
        family = self.family
        parts: dict[str, nn.Module] = {family.final_norm: nn.Identity()}
        if family.positions is not None:
            parts[family.positions] = _NoPositions()
        with self.in_place(parts) as whole:
            whole.base_model(inputs_embeds=hidden_BTD, attention_mask=self.placed(attention_mask_BT), use_cache=False)
        return [catcher.options for catcher in self._catchers]  # type: ignore[misc]

    def materialised(self, name: str) -> nn.Module:
        """A module outside the layers with its weights, by its name in the model."""
        return self._fill(copy.deepcopy(self._whole.get_submodule(name)), f"{name}.")

    def placed(self, tensor: Tensor | None) -> Tensor | None:
        """The same tensor on the model's device."""
        return None if tensor is None else tensor.to(self.device)

    @contextmanager
    def in_place(self, parts: Mapping[str, nn.Module]) -> Any:
        """The model with the given modules, by name, in place of its own, which have no weights."""
        before = {name: self._whole.get_submodule(name) for name in parts}
        for name, module in parts.items():
            self._whole.set_submodule(name, module)
        try:
            with torch.no_grad():
                yield self._whole
        finally:
            for name, module in before.items():
                self._whole.set_submodule(name, module)

    @contextmanager
    def passing_on(self, hidden_BTD: Tensor) -> Any:
        """The last layer puts out these hidden states; learned positions, without weights, are left out."""
        positions = self.family.positions
        last: Any = self._catchers[-1]
        with self.in_place({} if positions is None else {positions: _NoPositions()}):
            last.instead_BTD = hidden_BTD
            try:
                yield
            finally:
                last.instead_BTD = None

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        """Gives a module on the meta device its weights from the files, and its buffers by the family's own rule."""
        module.to_empty(device=self.device)
        for part in module.modules():
            if list(part.buffers(recurse=False)):
                with torch.random.fork_rng(devices=[]):  # weights that it draws are overwritten
                    self._whole._init_weights(part)
        tied = f"{self.family.lm_head}.weight" if is_tied(self.config) else None
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                full = f"{prefix}{name}"
                stored = self.tensors.get(f"{self.family.embedding}.weight" if full == tied else full)
                if stored is None or stored.shape != parameter.shape:
                    found = "is not there" if stored is None else f"has shape {tuple(stored.shape)}"
                    raise UserError(
                        f"{full} {found} in the model's files; its config.json promises {tuple(parameter.shape)}. "
                        "Save the model again with save_pretrained."
                    )
                parameter.copy_(stored)
        return module.requires_grad_(False)
