"""Ways to choose what to keep without learning it: a score a unit, the largest stay.

`magnitude` needs the weights alone. `activation` and `block_influence` run the model over calibration text, watched by
hooks on modules that every family names: norms, what goes into output and down projection, layers.

Shape suffixes: N sequences of a batch, T tokens, L layers, D hidden, H query heads, K key/value heads, P head
dimension, F intermediate.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shearing.models.families import Family
from shearing.models.shape import Shape
from shearing.pruning.gates import largest_gates
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import GroupSpec

Scores = dict[str, Tensor]


def choose_units(scores: Mapping[str, Tensor], groups: Mapping[str, GroupSpec]) -> dict[str, Tensor]:
    """Gates of 1 for the largest scores of every row, at exactly the target's size, and 0 for the other units.

    Units that a group forces to stay or go do. Of equal scores the earlier unit stays.

    Args:
        scores: By group, in the group's shape; finite.
        groups: Group specifications by name.
    """
    gates = {}
    for name, spec in groups.items():
        ranked = scores[name].detach().double().cpu().clone()
        assert tuple(ranked.shape) == spec.shape, (name, ranked.shape, spec.shape)
        assert bool(torch.isfinite(ranked).all()), name
        ranked = torch.argsort(torch.argsort(ranked, dim=-1, descending=True, stable=True), dim=-1)
        ranked = spec.size - ranked.float()  # from size to 1, so that forced units can stand outside
        ranked[..., list(spec.kept)] = spec.size + 1.0
        ranked[..., list(spec.dropped)] = 0.0
        assert spec.target is not None, name
        gates[name] = (largest_gates(ranked, spec.target) > 0).float()
    return gates


def random_scores(groups: Mapping[str, GroupSpec], seed: int) -> Scores:
    """Uniform numbers, a pure function of groups and seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(spec.shape, generator=generator) for name, spec in groups.items()}


@torch.no_grad()
def magnitude_scores(model: nn.Module, family: Family, shape: Shape) -> Scores:
    """L2 norms of the weights through which a unit is heard: the fairest that needs no text.

    A head's and an intermediate unit's columns of the projection that reads them, a hidden dimension's rows of all
    those projections and its column of the embedding, a layer's both projections whole.
    """
    head_LH, intermediate_LF, squares_D = [], [], _weight(model, family.embedding).square().sum(0)
    layers = []
    for layer in range(shape.num_layers):
        output, down = (_weight(model, family.layer_module(layer, name)) for name in (family.output, family.down))
        head_LH.append(output.square().sum(0).view(shape.num_heads, shape.head_size).sum(-1).sqrt())
        intermediate_LF.append(down.square().sum(0).sqrt())
        squares_D = squares_D + output.square().sum(1) + down.square().sum(1)
        layers.append((output.square().sum() + down.square().sum()).sqrt())
    scores = {"hidden": squares_D.sqrt(), "intermediate": torch.stack(intermediate_LF), "layer": torch.stack(layers)}
    return scores | _head_scores(torch.stack(head_LH), shape)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _head_scores(head_LH: Tensor, shape: Shape) -> Scores:
    """Scores of query heads in the groups of gates: with grouped queries sums over what a gate holds."""
    if shape.num_heads == shape.num_kv_heads:
        return {"head": head_LH}
    head_LKQ = head_LH.view(shape.num_layers, shape.num_kv_heads, -1)
    return {"head": head_LKQ.sum(1), "kv_head": head_LKQ.sum(2)}


@torch.no_grad()
def activation_scores(model: nn.Module, family: Family, shape: Shape, batches: Iterable[Tensor]) -> Scores:
    """Width scores of Minitron, and block influence for layers, over calibration text.

    Of each sequence the mean over its tokens is taken, of all sequences the L2 norm, the pair of aggregations that the
    paper found best: of the L2 norm of each head's output, of the size of each intermediate unit (what goes into the
    down projection), and of the size of each dimension of a norm's output, summed over the norms.
    A layer's block influence is 1 - cosine(what goes into it, what comes out), averaged over all tokens.

    Args:
        model: In evaluation mode; its device is where all of it runs.
        family: Of the model.
        shape: Of the model.
        batches: Token ids [N, T].

    Returns:
        `hidden` [D], `intermediate` [L, F], `head` and, with grouped queries, `kv_head`, and `layer` [L]; float32.

    Source: arXiv 2407.14679, section 2.2; layers: arXiv 2403.03853, section 2.2.
    """
    recorder = _Recorder(family, shape)
    with recorder.watching(model):
        for ids_NT in batches:
            recorder.length = ids_NT.shape[1]
            model(input_ids=ids_NT, use_cache=False)
    scores = {"hidden": torch.stack([recorder.root(f"norm {name}") for name in recorder.norms(shape)]).sum(0)}
    scores["intermediate"] = torch.stack([recorder.root(f"down {layer}") for layer in range(shape.num_layers)])
    head_LH = torch.stack([recorder.root(f"output {layer}") for layer in range(shape.num_layers)])
    influence_L = [1 - recorder.sums[f"cosine {layer}"] / recorder.tokens for layer in range(shape.num_layers)]
    return {**scores, **_head_scores(head_LH, shape), "layer": torch.stack(influence_L).float()}


class _Recorder:
    """Sums over calibration text, kept on the model's device."""

    def __init__(self, family: Family, shape: Shape) -> None:
        self.family, self.shape = family, shape
        self.sums: dict[str, Tensor] = {}
        self.tokens = self.length = 0  # of all text so far, and of each sequence of this batch

    def norms(self, shape: Shape) -> list[str]:
        """Names of the norms that read the residual stream; where layers have none, of those that write to it."""
        inside = self.family.pre_norms or self.family.post_norms
        layers = [self.family.layer_module(layer, name) for layer in range(shape.num_layers) for name in inside]
        return [*layers, self.family.final_norm]

    def root(self, key: str) -> Tensor:
        """The L2 norm over sequences of what `_mean_of_tokens` added up."""
        return self.sums[key].sqrt().float()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        family, handles = self.family, []
        for name in self.norms(self.shape):
            handles.append(model.get_submodule(name).register_forward_hook(partial(self._norm, name)))
        for layer in range(self.shape.num_layers):
            for name, see in ((family.output, self._heads), (family.down, self._intermediate)):
                module = model.get_submodule(family.layer_module(layer, name))
                handles.append(module.register_forward_pre_hook(partial(see, layer)))
            module = model.get_submodule(f"{family.layers}.{layer}")
            handles.append(module.register_forward_hook(partial(self._cosine, layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm(self, name: str, _module: nn.Module, _args: Any, out: Tensor) -> None:
        self._mean_of_tokens(f"norm {name}", out.abs())

    def _intermediate(self, layer: int, _module: nn.Module, args: Any) -> None:
        self._mean_of_tokens(f"down {layer}", args[0].abs())

    def _heads(self, layer: int, _module: nn.Module, args: Any) -> None:
        heads_NTHP = args[0].float().unflatten(-1, (self.shape.num_heads, self.shape.head_size))
        self._mean_of_tokens(f"output {layer}", heads_NTHP.norm(dim=-1))

    def _mean_of_tokens(self, key: str, sizes_NTX: Tensor) -> None:
        if sizes_NTX.ndim == 2:  # some families lay all tokens of a batch in a row
            sizes_NTX = sizes_NTX.unflatten(0, (-1, self.length))
        self._add(key, sizes_NTX.float().mean(1).double().square().sum(0))

    def _cosine(self, layer: int, _module: nn.Module, args: Any, options: Any, out: Any) -> None:
        before_NTD = (args[0] if args else options["hidden_states"]).float()
        after_NTD = (out[0] if isinstance(out, tuple) else out).float()
        cosine_NT = functional.cosine_similarity(before_NTD, after_NTD, dim=-1)
        self._add(f"cosine {layer}", cosine_NT.double().sum())
        if layer == 0:
            self.tokens += cosine_NT.numel()

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value


@torch.no_grad()
def removal_scores(model: nn.Module, family: Family, shape: Shape, batches: Iterable[Tensor]) -> Tensor:
    """Loss in nats a token without each layer, [L]: the larger, the more the layer is missed.

    The depth score of Minitron (perplexity without the layer); costs a pass over the calibration text a layer.

    Source: arXiv 2407.14679, section 2.2.
    """
    batches, slots, losses = list(batches), attach_gates(model, family), []
    for layer in range(shape.num_layers):
        slots.set({"layer": torch.ones(shape.num_layers).index_fill(0, torch.tensor(layer), 0.0)})
        total = tokens = 0.0
        for ids_NT in batches:
            logits = model(input_ids=ids_NT, use_cache=False).logits[:, :-1].float()
            total += float(functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten(), reduction="sum"))
            tokens += ids_NT[:, 1:].numel()
        losses.append(total / tokens)
    slots.set(None)
    # a model that a missing layer turns into no numbers misses it most of all
    worst = 1 + max((loss for loss in losses if math.isfinite(loss)), default=0.0)
    return torch.tensor([loss if math.isfinite(loss) else worst for loss in losses])
