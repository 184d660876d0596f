"""Gates on a Hugging Face model: exact, cheap, and by the same formulas that extraction folds into the weights.

Shape suffixes: L layers, D hidden, H query heads, K key/value heads, P head dimension, F intermediate, N tokens of a
batch; O and I are the output and input size of a linear layer.

Gates act in four kinds of places. The output of the embedding, and of learned positions, is multiplied by the hidden
gates. A norm's weight is multiplied by them, and its statistics are over the dimensions that are not closed. The
attention's output projection and the MLP's down projection use `W[o, i] * out[o] * in[i]` for W, where `out` is layer
gate times hidden gates and `in` is the head gates, once a head dimension, or the intermediate gates. That product costs
O(O I) where a multiplication of activations costs O(N (O + I)) and keeps them for the backward pass; it is formed in
the gates' own float32, rounded once to the weight's type, never kept, and formed again in the backward pass.

A norm between such a projection and the residual stream would cancel the layer gate. There the norm's weight carries
`out`, and the projection the hidden gates alone, so that closed dimensions are zero in the norm's statistics. A norm
over all queries or keys takes its statistics over the heads that are not closed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from shearing.models.families import Family
from shearing.models.family import shape_of
from shearing.models.recognition import check_model
from shearing.models.shape import Shape
from shearing.pruning.gated_norms import GATED_NORMS, Kept, gated_head_norm, gated_vector


@dataclass(frozen=True)
class ExpandedGates:
    """Gates in the shapes in which they meet weights; None where no group of gates touches that place.

    Attributes:
        hidden_D: For embedding and norms.
        attention_LD: Layer gate times hidden gates, for outputs of attention.
        mlp_LD: The same for outputs of the MLP; one and the same tensor where no gate tells the two apart.
        head_LI: For inputs of the output projection; I is H times P.
        key_LK: Of key/value heads; they multiply nothing, but tell which heads a norm over all keys is of.
        intermediate_LF: For inputs of the down projection.
    """

    hidden_D: Tensor | None
    attention_LD: Tensor | None
    mlp_LD: Tensor | None
    head_LI: Tensor | None
    key_LK: Tensor | None
    intermediate_LF: Tensor | None


def expand_gates(z: Mapping[str, Tensor], shape: Shape) -> ExpandedGates:
    """Gates by group, expanded for a source model's shape; differentiable.

    Raises:
        ValueError: A group that is none, or a shape that is not that group's.
    """
    _check_gates(z, shape)
    multi_head = shape.num_heads == shape.num_kv_heads
    attention_LD = mlp_LD = _out(z, shape, ("layer",))
    if "attention_layer" in z or "mlp_layer" in z:
        attention_LD, mlp_LD = (_out(z, shape, ("layer", name)) for name in ("attention_layer", "mlp_layer"))
    head_LH = None
    if "kv_head" in z:
        head_LH = z["kv_head"].repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
    if "head" in z:
        # With grouped queries one row of gates serves the queries of every group.
        shared_LH = z["head"] if multi_head else z["head"].repeat(1, shape.num_kv_heads)
        head_LH = shared_LH if head_LH is None else head_LH * shared_LH
    head_LI = None if head_LH is None else head_LH.repeat_interleave(shape.head_size, dim=1)
    key_LK = z.get("head" if multi_head else "kv_head")
    return ExpandedGates(z.get("hidden"), attention_LD, mlp_LD, head_LI, key_LK, z.get("intermediate"))


def _out(z: Mapping[str, Tensor], shape: Shape, groups: tuple[str, ...]) -> Tensor | None:
    layer_L = None
    for name in groups:
        if name in z:
            layer_L = z[name] if layer_L is None else layer_L * z[name]
    if layer_L is None:
        return z["hidden"].expand(shape.num_layers, -1) if "hidden" in z else None
    layer_LD = layer_L[:, None].expand(-1, shape.hidden_size)
    return layer_LD * z["hidden"] if "hidden" in z else layer_LD


def _check_gates(z: Mapping[str, Tensor], shape: Shape) -> None:
    ratio = shape.num_heads // shape.num_kv_heads
    expected = {
        "layer": (shape.num_layers,),
        "attention_layer": (shape.num_layers,),
        "mlp_layer": (shape.num_layers,),
        "hidden": (shape.hidden_size,),
        "head": (shape.num_layers, shape.num_heads if ratio == 1 else ratio),
        "kv_head": (shape.num_layers, shape.num_kv_heads),
        "intermediate": (shape.num_layers, shape.intermediate_size),
    }
    for name, gates in z.items():
        if name not in expected or tuple(gates.shape) != expected[name]:
            raise ValueError(
                f"gates {name!r} have shape {tuple(gates.shape)}; this model has {expected}. "
                "Make the gates from the same source shape with gate_groups."
            )


def gated_weight(weight_OI: Tensor, out_O: Tensor | None, in_I: Tensor | None) -> Tensor:
    """`W[o, i] * in[i] * out[o]`, formed in the wider of both types and rounded once to the weight's."""
    product_OI = weight_OI
    if in_I is not None:
        product_OI = product_OI * in_I
    if out_O is not None:
        product_OI = product_OI * out_O[:, None] if product_OI is weight_OI else product_OI.mul_(out_O[:, None])
    return product_OI.to(weight_OI.dtype)


class GatedLinear(torch.autograd.Function):
    """A linear layer with gates on its outputs and inputs; saves nothing that a plain one does not save."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd functions take no keywords)
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        out_O: Tensor | None,
        in_I: Tensor | None,
    ) -> Tensor:
        """`x @ W'.T + b'` with gated weight and bias; x is [..., I]."""
        ctx.save_for_backward(x, weight_OI, bias_O, out_O, in_I)
        bias = None if bias_O is None else gated_vector(bias_O, out_O)
        return F.linear(x, gated_weight(weight_OI, out_O, in_I), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and both gate vectors."""
        x, weight_OI, bias_O, out_O, in_I = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad @ gated_weight(weight_OI, out_O, in_I) if ctx.needs_input_grad[0] else None
        grad_NO, x_NI = grad.reshape(-1, weight_OI.shape[0]), x.reshape(-1, weight_OI.shape[1])
        grad_OI = grad_NO.T @ x_NI  # of the gated weight
        grad_out, grad_in = _gate_gradients(grad_OI, weight_OI, out_O, in_I)
        grad_bias = None
        if bias_O is not None:
            grad_O = grad_NO.sum(0)
            if out_O is not None:
                grad_out = grad_out + grad_O * bias_O
            grad_bias = gated_vector(grad_O, out_O)
        # grad_OI is not needed any more, so its memory becomes the weight's gradient.
        grad_weight = _gate_in_place(grad_OI, out_O, in_I) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias, grad_out, grad_in


def _gate_gradients(
    grad_OI: Tensor, weight_OI: Tensor, out_O: Tensor | None, in_I: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    gates = out_O if out_O is not None else in_I
    assert gates is not None
    product_OI = (grad_OI * weight_OI).to(torch.promote_types(grad_OI.dtype, gates.dtype))
    grad_out = grad_in = None
    if out_O is not None:
        grad_out = product_OI.sum(1) if in_I is None else product_OI @ in_I
    if in_I is not None:
        grad_in = product_OI.sum(0) if out_O is None else out_O @ product_OI
    return grad_out, grad_in


def _gate_in_place(grad_OI: Tensor, out_O: Tensor | None, in_I: Tensor | None) -> Tensor:
    if in_I is not None:
        grad_OI = grad_OI.mul_(in_I)
    return grad_OI if out_O is None else grad_OI.mul_(out_O[:, None])


def _gated_linear_forward(module: nn.Module, out_O: Tensor | None, in_I: Tensor | None, x: Tensor) -> Tensor:
    return GatedLinear.apply(x, module.weight, module.bias, out_O, in_I)


def _gated_embedding_forward(forward: Callable[..., Tensor], hidden_D: Tensor, *args: Any, **options: Any) -> Tensor:
    return gated_vector(forward(*args, **options), hidden_D)


class GateSlots:
    """The places of one model where gates act. Made by `attach_gates`.

    Modules keep their hooks: only the `forward` of an instance is replaced while gates are set, so that engines that
    bring weights in by hooks (ZeRO stage 3) and activation checkpointing work as before. Without gates the model's own
    forwards are in place, and nothing costs anything.

    One optimiser step: `z = gates.sample(noise)`, `slots.set(z)`, any number of forward and backward passes,
    `slots.gradients()`, then `torch.autograd.backward(list(z.values()), [grads[name] for name in z])`. Gates enter the
    model as leaves, already expanded (layer times hidden, head gates a head dimension), so expansion happens once a
    step and no micro-batch's backward frees a graph that the next one needs.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model, self._family = model, family
        self.shape: Shape = shape_of(model.config)
        self._replaced: list[nn.Module] = []
        self._leaves: dict[str, Tensor] = {}
        self._expanded: list[tuple[Tensor, Tensor]] = []  # with its graph back to the leaves; the leaf the model uses

    def set(self, z: Mapping[str, Tensor] | None) -> None:
        """Sets gates by group (see `shearing.pruning.target.gate_groups` for shapes), or none: the plain model.

        Gradients gathered before are dropped. Do not call between a forward pass and its backward pass.

        Raises:
            ValueError: Shapes that are not this model's.
        """
        self._clear()
        if not z:
            return
        device = next(self._model.parameters()).device
        with torch.enable_grad():
            self._leaves = {name: gates.detach().requires_grad_() for name, gates in z.items()}
            expanded = expand_gates({name: gates.to(device) for name, gates in self._leaves.items()}, self.shape)
            self._install(expanded)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients with respect to the gates that were set, summed over all backward passes since; by group."""
        assert self._leaves, "no gates are set"
        names = list(self._leaves)
        outputs = [expanded for expanded, _ in self._expanded]
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in self._expanded]
        found = torch.autograd.grad(outputs, [self._leaves[name] for name in names], grads, retain_graph=True)
        return dict(zip(names, found, strict=True))

    def _install(self, gates: ExpandedGates) -> None:
        family = self._family
        hidden, kept = self._install_hidden(gates.hidden_D)
        attention = self._rows(gates.attention_LD)
        mlp = attention if gates.mlp_LD is gates.attention_LD else self._rows(gates.mlp_LD)
        branches = (
            (family.output, family.attention_post_norm, attention, self._rows(gates.head_LI)),
            (family.down, family.mlp_post_norm, mlp, self._rows(gates.intermediate_LF)),
        )
        for layer in range(self.shape.num_layers):
            for name, norm, out, inner in branches:
                before_norm = out[layer] if norm is None else hidden
                if before_norm is not None or inner[layer] is not None:
                    module = self._model.get_submodule(family.layer_module(layer, name))
                    self._replace(module, partial(_gated_linear_forward, module, before_norm, inner[layer]))
                if norm is not None and out[layer] is not None:
                    self._gate_norm(family.layer_module(layer, norm), out[layer], kept)
        if family.head_norm_span == "all":
            key_LK = gates.key_LK
            key_LI = None if key_LK is None else key_LK.repeat_interleave(self.shape.head_size, dim=1)
            for norm, gates_LI in zip(family.head_norms, (gates.head_LI, key_LI), strict=True):
                self._install_head_norms(norm, gates_LI)

    def _install_hidden(self, hidden_D: Tensor | None) -> tuple[Tensor | None, Kept]:
        if hidden_D is None:
            return None, Kept(self.shape.hidden_size, None)
        family = self._family
        leaf, open_D = self._leaf(hidden_D), hidden_D.detach() != 0
        kept = Kept(max(1, int(open_D.sum())), open_D)
        for name in (family.embedding, family.positions):
            if name is not None:
                module = self._model.get_submodule(name)
                self._replace(module, partial(_gated_embedding_forward, module.forward, leaf))
        self._gate_norm(family.final_norm, leaf, kept)
        for layer in range(self.shape.num_layers):
            for name in family.pre_norms:
                self._gate_norm(family.layer_module(layer, name), leaf, kept)
        return leaf, kept

    def _gate_norm(self, name: str, gates_D: Tensor | None, kept: Kept) -> None:
        norm = self._model.get_submodule(name)
        epsilon = getattr(norm, self._family.norm_epsilon)
        self._replace(norm, partial(GATED_NORMS[self._family.norm], norm, epsilon, gates_D, kept))

    def _install_head_norms(self, name: str, gates_LI: Tensor | None) -> None:
        if gates_LI is None:
            return
        open_LI = gates_LI.detach() != 0
        for layer, count in enumerate(open_LI.sum(-1).tolist()):
            if count < open_LI.shape[1]:
                norm = self._model.get_submodule(self._family.layer_module(layer, name))
                epsilon = getattr(norm, self._family.norm_epsilon)
                kept = Kept(max(1, count), open_LI[layer])
                self._replace(norm, partial(gated_head_norm, self._family.norm, norm, epsilon, kept))

    def _rows(self, gates_LX: Tensor | None) -> list[Tensor | None]:
        if gates_LX is None:
            return [None] * self.shape.num_layers
        return [self._leaf(row) for row in gates_LX.unbind(0)]

    def _leaf(self, expanded: Tensor) -> Tensor:
        leaf = expanded.detach().contiguous().requires_grad_()
        self._expanded.append((expanded, leaf))
        return leaf

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        assert "forward" not in vars(module), "another tool has replaced this module's forward"
        module.forward = forward
        self._replaced.append(module)

    def _clear(self) -> None:
        for module in self._replaced:
            del module.forward
        self._replaced, self._leaves, self._expanded = [], {}, []


def attach_gates(model: nn.Module, family: Family) -> GateSlots:
    """Finds where gates act in a Hugging Face causal language model of a registered family; changes nothing yet.

    Raises:
        UserError: The model's modules or weights are not those of its family.
    """
    check_model(model, family)
    return GateSlots(model, family)
