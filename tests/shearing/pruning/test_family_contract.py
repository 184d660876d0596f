"""What every registered family keeps: masked, extracted and reloaded models are one function."""

import pytest
import torch
from masked_models import all_groups, extracted, load_quietly, logits, random_gates, relative_difference
from tiny_models import TOKENS, VARIANTS, shapes_of, targets_of, tiny_config, tiny_model, widest_of
from transformers import GenerationConfig

from shearing.models.family import family_of, shape_of
from shearing.models.loading import StoredTensors, new_model, read_config, write_model_directory
from shearing.models.parameters import count_parameters, parameter_sizes
from shearing.pruning.extraction import kept_units
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import check_target, target_shape

TOLERANCE = 1e-4  # of logits, relative to the largest
EVERYWHERE = [(variant, target) for variant in VARIANTS for target in targets_of(variant)]
HEAD_TARGETS = [(variant, target) for variant, target in EVERYWHERE if target in ("heads", "both")]


class TestFamilyContract:
    """One for all: a family that is not in it is not registered."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_open_gates_change_nothing(self, variant):
        """Catches a gated forward that is not the model's own."""
        for shape in shapes_of(variant):
            model = tiny_model(variant, shape)
            plain = logits(model)
            slots = attach_gates(model, family_of(model.config))
            slots.set({name: torch.ones(spec.shape) for name, spec in all_groups(shape).items()})
            assert relative_difference(logits(model), plain) < 1e-6
            slots.set(None)
            assert torch.equal(logits(model), plain)
            assert not any("forward" in vars(module) for module in model.modules())

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_open_gates_change_nothing_in_bfloat16(self, variant):
        """Catches casts in another order than the model's own: whole steps of the type, not last bits."""
        shape = shapes_of(variant)[-1]
        model = tiny_model(variant, shape, dtype=torch.bfloat16)
        plain = logits(model)
        slots = attach_gates(model, family_of(model.config))
        slots.set({name: torch.ones(spec.shape) for name, spec in all_groups(shape).items()})
        if family_of(model.config).norm == "layer":  # torch's own kernel sums in another order
            assert relative_difference(logits(model), plain) < 0.02
        else:
            assert torch.equal(logits(model), plain)

    @pytest.mark.parametrize(("variant", "target"), HEAD_TARGETS)
    def test_gradients_agree_with_finite_differences(self, variant, target):
        """Catches a gate whose gradient is dropped, doubled or gathered from one micro-batch only."""
        source, asked = targets_of(variant)[target]
        model = tiny_model(variant, source, dtype=torch.float64)
        names = family_of(model.config)
        slots = attach_gates(model, names)
        z = {
            name: gate.double() * 0.5 + 0.3
            for name, gate in random_gates(source, target_shape(source, asked), seed=3).items()
        }
        rows = TOKENS.unsqueeze(1)  # two micro-batches

        def loss(tokens):  # Hugging Face's own is in float32
            predicted = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())

        slots.set(z)
        for micro_batch in rows:
            loss(micro_batch).backward()
        grads = slots.gradients()
        assert set(grads) == set(z)
        generator = torch.Generator().manual_seed(5)
        # norms of heads and the unfused attention are in float32 in the model's own code, whatever its type
        noisy = bool(names.head_norms) or names.attention == "eager"
        tolerance = {"rel": 2e-3, "abs": 2e-4} if noisy else {"rel": 1e-6, "abs": 1e-7}
        for name, gate in z.items():
            assert grads[name].shape == gate.shape
            dead = 0.5 if getattr(model.config, "activation_function", "") == "relu" and name == "intermediate" else 0.0
            assert (grads[name] == 0).float().mean() <= dead, name
            direction = torch.randn(gate.shape, generator=generator, dtype=torch.float64)

            def slope(step, moved=name, along=direction):
                values = []
                for sign in (1, -1):
                    slots.set(z | {moved: z[moved] + sign * step * along})
                    with torch.no_grad():
                        values.append(float(sum(loss(micro_batch) for micro_batch in rows)))
                return (values[0] - values[1]) / (2 * step)

            measured = (4 * slope(1e-3) - slope(2e-3)) / 3 if noisy else slope(1e-5)
            assert float((grads[name] * direction).sum()) == pytest.approx(measured, **tolerance), name

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_gradients_with_closed_units_are_those_of_the_extracted_model(self, variant):
        """Catches statistics that let the gradient of a closed unit through: its weights must stay as they are."""
        source, asked = widest_of(variant)
        small = target_shape(source, asked)
        model = tiny_model(variant, source)
        names = family_of(model.config)
        z = random_gates(source, small, hard=True)
        slots = attach_gates(model, names)
        slots.set(z)
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        slots.set(None)
        config, tensors = extracted(model, z, small)
        pruned = new_model(config)
        pruned.load_state_dict(tensors)
        pruned.eval()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        layers = kept_units(z, source, small)["layer"]
        for name, parameter in pruned.named_parameters():
            for new, layer in enumerate(layers):
                if name.startswith(names.layer_module(new, "")):
                    name = names.layer_module(layer, name.removeprefix(names.layer_module(new, "")))  # noqa: PLW2901
                    break
            scale = (source.hidden_size / small.hidden_size) ** 0.5
            factor = scale if names.scaled_embedding and name == f"{names.embedding}.weight" else 1.0
            torch.testing.assert_close(
                gradients[name].norm(), parameter.grad.norm() * factor, rtol=1e-4, atol=1e-7, msg=name
            )

    @pytest.mark.parametrize(("variant", "target"), EVERYWHERE)
    @pytest.mark.parametrize(("tied", "hard"), [(False, False), (True, False), (False, True)])
    def test_masked_is_extracted_is_reloaded(self, variant, target, tied, hard, tmp_path, caplog):
        """Catches any unit, gate or norm that is folded otherwise than it was masked."""
        source, asked = targets_of(variant)[target]
        small = target_shape(source, asked)
        model = tiny_model(variant, source, tied)
        names = family_of(model.config)
        assert check_target(names, source, asked, config=tiny_config(variant, source)) == []
        z = random_gates(source, small, hard=hard)
        slots = attach_gates(model, names)
        slots.set(z)
        masked = logits(model)
        config, tensors = extracted(model, z, small)
        assert shape_of(config) == small
        assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(config)
        assert count_parameters(model.config, small) == count_parameters(config)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_sizes(config)
        pruned = new_model(config)
        pruned.load_state_dict(tensors, strict=not tied)
        pruned.tie_weights()
        assert relative_difference(logits(pruned.eval()), masked) < TOLERANCE
        write_model_directory(tmp_path / "pruned", config, tensors.items())
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        assert shape_of(reloaded.config) == small
        assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) == tied
        assert relative_difference(logits(reloaded), masked) < TOLERANCE

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_generates_with_a_cache_and_is_saved_again(self, variant, tmp_path, caplog):
        """Catches a config that no longer fits its weights in generation (windows of layers, head sizes)."""
        source, asked = widest_of(variant)
        small = target_shape(source, asked)
        model = tiny_model(variant, source)
        config, tensors = extracted(model, random_gates(source, small), small)
        assert len(config.get("layer_types") or range(small.num_layers)) == small.num_layers
        write_model_directory(tmp_path / "pruned", config, tensors.items(), generation_config={"eos_token_id": 2})
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        written = reloaded.generate(
            TOKENS[:1], generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
        )
        assert written.shape[1] > TOKENS.shape[1] + 1
        for position in range(TOKENS.shape[1], written.shape[1]):
            assert int(logits(reloaded, written[:, :position])[0, -1].argmax()) == int(written[0, position])
        reloaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load_quietly(tmp_path / "again", caplog)), logits(reloaded))
        assert set(StoredTensors(tmp_path / "again")) == set(StoredTensors(tmp_path / "pruned")) == set(tensors)
        assert read_config(tmp_path / "pruned")["bos_token_id"] == 1

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_bfloat16_folds_what_it_masked(self, variant):
        """Catches gates rounded before the product, and a directory whose weights are not of the type asked for."""
        source, asked = targets_of(variant).get("groups", targets_of(variant)["heads"])
        small = target_shape(source, asked)
        model = tiny_model(variant, source, dtype=torch.bfloat16)
        z = random_gates(source, small)
        slots = attach_gates(model, family_of(model.config))
        slots.set(z)
        masked = logits(model).float()
        config, tensors = extracted(model, z, small, dtype=torch.bfloat16)
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        assert config["dtype"] == "bfloat16"
        small_model = new_model(config, dtype=torch.bfloat16)
        small_model.load_state_dict(tensors, strict=True)
        assert relative_difference(logits(small_model.eval()).float(), masked) < 0.05
