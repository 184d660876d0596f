"""What every registered family keeps: masked, extracted and reloaded models are one function."""

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig

from shearing.models.family import FAMILIES, family_of, shape_of
from shearing.models.loading import (
    StoredTensors,
    load_model,
    model_tensors,
    new_model,
    read_config,
    write_model_directory,
)
from shearing.models.parameters import count_parameters
from shearing.pruning.extraction import expected_names, extract, kept_units
from shearing.pruning.gates import Gates
from shearing.pruning.masks import GatedLinear, attach_gates
from shearing.pruning.target import check_target, gate_groups, target_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import GROUPED, MULTI_HEAD, TARGETS, TOKENS, tiny_config, tiny_model

GOLDEN_MODEL = Path(__file__).parents[4] / "shared/golden/models/llama_gqa"
everywhere = [(family, target) for family in FAMILIES for target in TARGETS]


def random_gates(source, target, seed=0, hard=False):
    """Gates at the target's exact size: random numbers in (0.2, 1), or ones, where open."""
    gates = Gates(gate_groups(source, target), initial_log_alpha=0.0, initial_log_alpha_std=2.0, seed=seed)
    z = gates.deterministic(exact=True)
    return {name: (gate != 0).float() for name, gate in z.items()} if hard else z


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def extracted(model, z, target, **options):
    """Config and tensors of the pruned model, as two dicts."""
    config, tensors = extract(model.config, family_of(model.config), dict(model_tensors(model)), z, target, **options)
    return config, dict(tensors)


@pytest.mark.parametrize("family", FAMILIES)
class TestMasks:
    def test_open_gates_change_nothing(self, family):
        """Catches a gated forward that is not the model's own."""
        for shape in (MULTI_HEAD, GROUPED):
            model = tiny_model(family, shape)
            plain = logits(model)
            slots = attach_gates(model, family_of(model.config))
            groups = gate_groups(shape, shape, ("layer", "hidden", "head", "kv_head", "intermediate"))
            slots.set({name: torch.ones(spec.shape) for name, spec in groups.items()})
            assert relative_difference(logits(model), plain) < 1e-6
            slots.set(None)
            assert torch.equal(logits(model), plain)
            assert not any("forward" in vars(module) for module in model.modules())

    def test_a_closed_gate_shows(self, family):
        """Catches a group that is accepted and then not applied."""
        for shape in (MULTI_HEAD, GROUPED):
            model = tiny_model(family, shape)
            plain = logits(model)
            slots = attach_gates(model, family_of(model.config))
            for name, spec in gate_groups(shape, shape, ("layer", "hidden", "head", "kv_head", "intermediate")).items():
                z = torch.ones(spec.shape)
                z[..., 0] = 0
                slots.set({name: z})
                assert relative_difference(logits(model), plain) > 1e-3, name

    @pytest.mark.parametrize("target", ["heads", "both"])
    def test_gradients_agree_with_finite_differences(self, family, target):
        """Catches a gate whose gradient is dropped, doubled or gathered from one micro-batch only."""
        source, asked = TARGETS[target]
        model = tiny_model(family, source, dtype=torch.float64)
        slots = attach_gates(model, family_of(model.config))
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
        step = 1e-4
        for name, gate in z.items():
            assert grads[name].shape == gate.shape
            assert (grads[name] != 0).all(), name
            direction = torch.randn(gate.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                slots.set(z | {name: gate + sign * step * direction})
                with torch.no_grad():
                    values.append(float(sum(loss(micro_batch) for micro_batch in rows)))
            measured = (values[0] - values[1]) / (2 * step)
            # float32 corners of the model's own code (norms of heads) leave some noise
            assert float((grads[name] * direction).sum()) == pytest.approx(measured, rel=2e-3, abs=1e-4), name

    def test_weight_gradients_are_those_of_multiplied_activations(self, family):
        """Catches a weight gradient without its gate; the reference multiplies activations, by hooks."""
        source, asked = TARGETS["groups"]
        model = tiny_model(family, source, dtype=torch.float64)
        names = family_of(model.config)
        z = {k: v.double() for k, v in random_gates(source, target_shape(source, asked)).items() if k != "hidden"}
        slots = attach_gates(model, names)
        slots.set(z)
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        slots.set(None)
        model.zero_grad()
        heads = z["kv_head"].repeat_interleave(source.num_heads // source.num_kv_heads * source.head_size, dim=1)
        for layer in range(source.num_layers):
            for name, inner in ((names.output, heads), (names.down, z["intermediate"])):
                module = model.get_submodule(names.layer_module(layer, name))
                module.register_forward_pre_hook(lambda _, args, g=inner[layer]: (args[0] * g,))
                module.register_forward_hook(lambda _, args, output, g=z["layer"][layer]: output * g)
        reference = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        reference.backward()
        torch.testing.assert_close(loss, reference)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, msg=name)

    def test_weights_may_be_there_only_while_a_module_runs(self, family):
        """Catches a gated forward that passes by the module's hooks, or keeps a weight that an engine takes away.

        Hooks stand in for an engine that partitions parameters: a weight is empty but inside its module's passes.
        """
        source, asked = TARGETS["both"]
        model = tiny_model(family, source)
        names = family_of(model.config)
        slots = attach_gates(model, names)
        z = random_gates(source, target_shape(source, asked))
        found = []
        for partitioned in (False, True):
            model.zero_grad()
            if partitioned:
                inside = (names.output, names.down, names.attention_norm, names.mlp_norm)
                for layer in range(source.num_layers):
                    for name in inside:
                        partition(model.get_submodule(names.layer_module(layer, name)))
            slots.set(z)
            loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            assert (model.model.layers[0].mlp.down_proj.weight.numel() == 0) == partitioned
            loss.backward()
            found.append(slots.gradients())
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, msg=name)


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


@pytest.mark.parametrize(("family", "target"), everywhere)
class TestExtraction:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("hard", [False, True])
    def test_masked_is_extracted_is_reloaded(self, family, target, tied, hard, tmp_path, caplog):
        """Catches any unit, gate or norm that is folded otherwise than it was masked."""
        source, asked = TARGETS[target]
        small = target_shape(source, asked)
        model = tiny_model(family, source, tied)
        names = family_of(model.config)
        assert check_target(names, source, asked) == []
        z = random_gates(source, small, hard=hard)
        slots = attach_gates(model, names)
        slots.set(z)
        masked = logits(model)
        config, tensors = extracted(model, z, small)
        assert shape_of(config) == small
        assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(config)
        assert set(tensors) == expected_names(config, names)
        write_model_directory(tmp_path / "pruned", config, tensors.items())
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        assert shape_of(reloaded.config) == small
        assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
        assert relative_difference(logits(reloaded), masked) < 1e-4


def load_quietly(folder, caplog, **options):
    """Loads by stock transformers; fails on any warning, logged or raised."""
    stock = logging.getLogger("transformers")
    stock.addHandler(caplog.handler)
    caplog.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        stock.removeHandler(caplog.handler)
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not logged
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
class TestPrunedModel:
    def test_generates_with_a_cache(self, family, tmp_path, caplog):
        """Catches a config that no longer fits its weights in generation (windows of layers, head sizes)."""
        source, asked = TARGETS["both"]
        small = target_shape(source, asked)
        model = tiny_model(family, source)
        config, tensors = extracted(model, random_gates(source, small), small)
        assert len(config.get("layer_types") or range(small.num_layers)) == small.num_layers
        write_model_directory(tmp_path / "pruned", config, tensors.items(), generation_config={"eos_token_id": 2})
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        written = reloaded.generate(
            TOKENS[:1], generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
        )
        for position in range(TOKENS.shape[1], written.shape[1]):
            assert int(logits(reloaded, written[:, :position])[0, -1].argmax()) == int(written[0, position])

    def test_keeps_windows_of_the_layers_that_stay(self, family):
        """Catches a list of layer types cut at its end instead of at the layers that went."""
        source, asked = TARGETS["layers_alone"]
        model = tiny_model(family, source)
        types = getattr(model.config, "layer_types", None)
        for layer in range(source.num_layers):
            z = {"layer": torch.zeros(source.num_layers)}
            z["layer"][layer] = 1.0
            config, _ = extracted(model, z, target_shape(source, asked))
            if types is not None:
                assert config["layer_types"] == [types[layer]]

    def test_bfloat16_folds_what_it_masked(self, family):
        """Catches gates rounded before the product, and a directory whose weights are not of the type asked for."""
        source, asked = TARGETS["groups"]
        small = target_shape(source, asked)
        model = tiny_model(family, source, dtype=torch.bfloat16)
        z = random_gates(source, small)
        slots = attach_gates(model, family_of(model.config))
        slots.set(z)
        masked = logits(model).float()
        config, tensors = extracted(model, z, small, dtype=torch.bfloat16)
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        assert config["dtype"] == "bfloat16"
        small_model = new_model(config, dtype=torch.bfloat16)
        small_model.load_state_dict(tensors, strict=True)
        assert relative_difference(logits(small_model.eval()).float(), masked) < 0.03

    def test_activation_checkpointing_leaves_gradients_alone(self, family):
        source, asked = TARGETS["both"]
        model = tiny_model(family, source)
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


class TestKeptUnits:
    def test_largest_stay_in_order(self):
        source, asked = TARGETS["queries"]
        small = target_shape(source, asked)
        z = random_gates(source, small)
        kept = kept_units(z, source, small)
        assert kept["layer"] == torch.nonzero(z["layer"]).flatten().tolist()
        assert kept["hidden"] == torch.nonzero(z["hidden"]).flatten().tolist()
        assert kept["head"] == [torch.nonzero(row).flatten().tolist() for row in z["head"]]
        assert [len(row) for row in kept["intermediate"]] == [13, 13, 13]

    def test_gates_that_are_not_at_the_target_are_refused(self):
        """Catches a right-shaped but wrong model out of gates that never closed."""
        source, asked = TARGETS["queries"]
        small = target_shape(source, asked)
        z = random_gates(source, small)
        z["hidden"] = torch.ones(source.hidden_size)
        with pytest.raises(ValueError, match="24 gates of 'hidden' are open in a row where the target has 16"):
            kept_units(z, source, small)

    def test_weights_unknown_to_the_family_are_refused(self):
        """Catches an extra weight (an adapter, another variant) that would be dropped without a word."""
        source, asked = TARGETS["heads"]
        model = tiny_model("qwen2", source)
        small = target_shape(source, asked)
        tensors = dict(model_tensors(model)) | {"model.layers.0.adapter.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"unknown \['model.layers.0.adapter.weight'\]"):
            extract(model.config, family_of(model.config), tensors, random_gates(source, small), small)

    def test_gates_of_another_model_are_refused(self):
        slots = attach_gates(tiny_model("llama", GROUPED), FAMILIES["llama"])
        with pytest.raises(ValueError, match="'head' have shape"):
            slots.set({"head": torch.ones(3, 6)})


@pytest.mark.skipif(not GOLDEN_MODEL.is_dir(), reason="no golden models beside this checkout")
class TestTrainedModel:
    """A llama trained on text, in the config format of an earlier transformers."""

    def test_masked_is_extracted_is_reloaded(self, tmp_path, caplog):
        model = load_model(GOLDEN_MODEL)
        config = read_config(GOLDEN_MODEL)
        source = shape_of(config)
        assert source == shape_of(model.config)
        target = source.model_copy(
            update={"num_layers": 3, "hidden_size": 96, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 256}
        )
        z = random_gates(source, target)
        slots = attach_gates(model, family_of(config))
        slots.set(z)
        tokens = torch.randint(1000, (2, 100), generator=torch.Generator().manual_seed(1))
        masked = logits(model, tokens)
        new_config, tensors = extract(config, family_of(config), StoredTensors(GOLDEN_MODEL), z, target)
        write_model_directory(
            tmp_path / "pruned", new_config, tensors, tokenizer_folder=GOLDEN_MODEL, max_shard_bytes=200_000
        )
        reloaded = load_quietly(tmp_path / "pruned", caplog)
        assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 2
        assert len(StoredTensors(tmp_path / "pruned")) == len(dict(model_tensors(reloaded)))
        assert relative_difference(logits(reloaded, tokens), masked) < 1e-4


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


def test_every_family_has_a_tiny_model():
    for family in FAMILIES:
        assert tiny_config(family, GROUPED)["model_type"] == family
