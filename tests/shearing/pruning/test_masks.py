"""Gates on models of every family beyond their contract: where they act, and what engines need of them."""

import pytest
import torch
from masked_models import all_groups, logits, outlets, random_gates, relative_difference
from tiny_models import GROUPED, TOKENS, VARIANTS, shapes_of, targets_of, tiny_model, widest_of
from torch.utils.checkpoint import checkpoint

from shearing.models.families import FAMILIES
from shearing.models.family import family_of
from shearing.pruning.extraction import kept_units
from shearing.pruning.masks import GatedLinear, attach_gates
from shearing.pruning.target import target_shape


class TestMasks:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_closed_gate_shows(self, variant):
        """Catches a group that is accepted and then not applied."""
        for shape in shapes_of(variant):
            model = tiny_model(variant, shape)
            plain = logits(model)
            slots = attach_gates(model, family_of(model.config))
            for name, spec in all_groups(shape).items():
                z = torch.ones(spec.shape)
                z[..., 0] = 0
                slots.set({name: z})
                assert relative_difference(logits(model), plain) > 1e-3, name

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("half", ["attention_layer", "mlp_layer"])
    def test_half_a_layer_goes_alone(self, variant, half):
        """Catches an attention gate on the MLP; the reference silences the branch by a hook."""
        shape = shapes_of(variant)[-1]
        model = tiny_model(variant, shape)
        names = family_of(model.config)
        z = {"hidden": torch.ones(shape.hidden_size), half: torch.tensor([1.0, 0.0, 0.5])}
        slots = attach_gates(model, names)
        slots.set(z)
        masked = logits(model)
        slots.set(None)
        _, last = outlets(names)[half == "mlp_layer"]
        for layer in range(shape.num_layers):
            module = model.get_submodule(names.layer_module(layer, last))
            module.register_forward_hook(lambda _, args, output, g=z[half][layer]: output * g)
        assert relative_difference(logits(model), masked) < 1e-5
        with pytest.raises(ValueError, match="no target shape holds"):
            kept_units(z, shape, shape)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weight_gradients_are_those_of_multiplied_activations(self, variant):
        """Catches a weight gradient without its gate; the reference multiplies activations, by hooks."""
        source, asked = targets_of(variant).get("groups", targets_of(variant)["heads"])
        model = tiny_model(variant, source, dtype=torch.float64)
        names = family_of(model.config)
        # none closed: norms over several heads leave the closed ones out
        z = {
            name: gate.double() * 0.5 + 0.3
            for name, gate in random_gates(source, target_shape(source, asked)).items()
            if name != "hidden"
        }
        slots = attach_gates(model, names)
        slots.set(z)
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        slots.set(None)
        model.zero_grad()
        heads = z["kv_head"] if "kv_head" in z else z["head"]
        heads = heads.repeat_interleave(source.num_heads * source.head_size // heads.shape[1], dim=1)
        for layer in range(source.num_layers):
            for (name, last), inner in zip(outlets(names), (heads, z["intermediate"]), strict=True):
                module = model.get_submodule(names.layer_module(layer, name))
                module.register_forward_pre_hook(lambda _, args, g=inner[layer]: (args[0] * g,))
                module = model.get_submodule(names.layer_module(layer, last))
                module.register_forward_hook(lambda _, args, output, g=z["layer"][layer]: output * g)
        reference = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        reference.backward()
        torch.testing.assert_close(loss, reference)
        for name, parameter in model.named_parameters():
            # the model's own norms are in float32 where those under a gate keep the wider type
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weights_may_be_there_only_while_a_module_runs(self, variant):
        """Catches a gated forward that passes by the module's hooks, or keeps a weight that an engine takes away.

        Hooks stand in for an engine that partitions parameters: a weight is empty but inside its module's passes.
        """
        source, asked = widest_of(variant)
        model = tiny_model(variant, source)
        slots = attach_gates(model, family_of(model.config))
        z = random_gates(source, target_shape(source, asked))
        found = []
        for partitioned in (False, True):
            model.zero_grad()
            slots.set(z)
            gated = [module for module in model.modules() if "forward" in vars(module)]
            assert len(gated) >= 2 + 3 * source.num_layers
            if partitioned:
                for module in gated:
                    partition(module)
            loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            assert all((module.weight.numel() == 0) == partitioned for module in gated)
            loss.backward()
            found.append(slots.gradients())
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, msg=name)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_activation_checkpointing_leaves_gradients_alone(self, variant):
        source, asked = widest_of(variant)
        model = tiny_model(variant, source)
        slots = attach_gates(model, family_of(model.config))
        z = random_gates(source, target_shape(source, asked))
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
            model.zero_grad()
            slots.set(z)
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            found.append(slots.gradients() | {n: p.grad.clone() for n, p in model.named_parameters()})
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, msg=name)

    def test_gates_of_another_model_are_refused(self):
        slots = attach_gates(tiny_model("llama", GROUPED), FAMILIES["llama"])
        with pytest.raises(ValueError, match="'head' have shape"):
            slots.set({"head": torch.ones(3, 6)})


def partition(module):
    whole = module.weight.data

    def take_away(*_):
        module.weight.data = torch.empty(0)

    def bring(*_):
        module.weight.data = whole

    module.register_forward_pre_hook(bring)
    module.register_forward_hook(take_away)
    module.register_full_backward_pre_hook(bring)
    take_away()


def test_checkpoint_of_a_gated_linear_needs_no_reentrant_mode():
    """Catches a custom backward that breaks when its saved tensors are dropped and made again."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, out, inner = (
        torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((3, 5, 4), (6, 4), (6,), (6,), (4,))
    )
    assert torch.autograd.gradcheck(GatedLinear.apply, (x, weight, bias, out, inner))
    assert torch.autograd.gradcheck(GatedLinear.apply, (x, weight, None, out, None))
    assert torch.autograd.gradcheck(GatedLinear.apply, (x, weight, bias, None, inner))
    assert torch.autograd.gradcheck(
        lambda *args: checkpoint(GatedLinear.apply, *args, use_reentrant=False), (x, weight, bias, out, inner)
    )
