"""What every family that can be sliced keeps: rotations change nothing, and a result is one model wherever it loads."""

import gc
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sliced_models import SLICEABLE, TEXT, difference, logits, saved, shares, sliced
from tiny_models import TOKENS, VARIANTS, shapes_of
from transformers import AutoModelForCausalLM

from shearing.errors import UserError
from shearing.models.families import FAMILIES
from shearing.models.layerwise import LayerwiseModel
from shearing.models.loading import StoredTensors, load_model, read_config
from shearing.models.parameters import count_parameters, parameter_sizes
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.fusion import fused_head
from shearing.pruning.slicing.plan import check_slicing, halves_of, sliced_parameters

TOLERANCE = 1e-4  # of logits, relative to the largest
SIZES = {"hidden_size": 16}
PLAIN = [variant for variant in SLICEABLE if not variant.startswith(("phi3 long", "gpt_neox", "opt"))]

LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[1])["tokens"]
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[f"{folder} logits"] = model(input_ids=tokens, use_cache=False).logits
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found[f"{folder} cached"] = model.generate(tokens, use_cache=True, **options)
    found[f"{folder} uncached"] = model.generate(tokens, use_cache=False, **options)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        found[f"{folder} again"] = again(input_ids=tokens, use_cache=False).logits
assert "shearing" not in sys.modules
save_file(found, sys.argv[1] + ".found")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A directory of every variant, tied where it can be."""
    root = tmp_path_factory.mktemp("sources")
    return {name: saved(root / name.replace(" ", "-"), name, shapes_of(name)[-1], tied=True) for name in VARIANTS}


@pytest.fixture(scope="module")
def results(sources, tmp_path_factory):
    """A sliced directory of every variant, with its report."""
    root = tmp_path_factory.mktemp("results")
    return {name: sliced(sources[name], root / name.replace(" ", "-"), **SIZES) for name in SLICEABLE}


@pytest.fixture(scope="module")
def elsewhere(results, tmp_path_factory):
    """What a process that knows nothing of us makes of these directories."""
    file = tmp_path_factory.mktemp("elsewhere") / "tokens.safetensors"
    save_file({"tokens": TOKENS}, file)
    folders = [str(folder) for folder, _ in results.values()]
    subprocess.run([sys.executable, "-I", "-c", LOAD, str(file), *folders], check=True, cwd=file.parent)
    return load_file(f"{file}.found")


@pytest.mark.parametrize("variant", SLICEABLE)
class TestContract:
    def test_norms_folded_away_change_nothing(self, variant, sources):
        # catches a weight or mean that a norm had and no linear layer has now, and a mean subtracted from an RMSNorm
        source = sources[variant]
        config, parts = read_config(source), LayerwiseModel(source)
        share = CalibrationShare(source, TOKENS)
        share.embed()
        for layer in range(parts.num_layers):
            for half in halves_of(config):
                share.follow(layer, half, None)
        (hidden_BTD,) = share._hidden
        epsilon = getattr(parts.materialised(parts.family.final_norm), parts.family.norm_epsilon)
        normed = hidden_BTD.double() * (hidden_BTD.double().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        (head,) = fused_head(parts.family, parts.tensors)
        found = torch.nn.functional.linear(normed, head.weight, head.bias)
        assert difference(found, logits(load_model(source))) < TOLERANCE

    @pytest.mark.parametrize("orientation", ["pca", "random"])
    def test_full_size_rotation_changes_nothing(self, variant, orientation, sources, tmp_path):
        # catches a reader, writer, bias or residual that is turned otherwise than the rest
        folder, _ = sliced(sources[variant], tmp_path, fraction=0, head=True, orientation=orientation)
        assert difference(logits(load_model(folder)), logits(load_model(sources[variant]))) < TOLERANCE

    def test_the_result_does_what_calibration_followed(self, variant, sources, results):
        # catches a signal measured in another network than the one that is written
        folder, _ = results[variant]
        with torch.no_grad():
            outputs = load_model(folder)(input_ids=TOKENS, output_hidden_states=True, use_cache=False)
        share = CalibrationShare(sources[variant], TOKENS)
        share.embed()
        work = folder.parent / "work" / "layers"
        basis = load_file(work / "first.safetensors")["rotation"]
        for layer, state in enumerate(outputs.hidden_states[:-1]):
            assert state.shape[-1] == basis.shape[1]
            assert difference(state, share._hidden[0] @ basis.float()) < 1e-3
            saved_layer = load_file(work / f"{layer:05d}.safetensors")
            for half in halves_of(read_config(sources[variant])):
                share.follow(layer, half, basis)
                basis = saved_layer[f"rotation.{half}"]

    def test_loads_elsewhere_generates_with_its_cache_and_is_saved_again(self, variant, results, elsewhere):
        # catches a modelling file that needs our package, a cache that slicing broke, and weights lost in saving
        folder, _ = results[variant]
        found = {name.split()[1]: tensor for name, tensor in elsewhere.items() if name.split()[0] == str(folder)}
        assert torch.equal(found["logits"], logits(load_model(folder)))
        assert torch.equal(found["again"], found["logits"])
        assert torch.equal(found["cached"], found["uncached"])

    def test_parameters_planned_are_those_written(self, variant, sources, results):
        # catches residual matrices, new biases or an untied head that the plan leaves out
        folder, report = results[variant]
        config = read_config(sources[variant])
        planned = sliced_parameters(config, SlicingConfig(**SIZES))
        model, stored = load_model(folder), StoredTensors(folder)
        assert planned == report.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert planned == count_parameters(read_config(folder)) == sum(stored[name].numel() for name in stored)
        assert parameter_sizes(read_config(folder)) == {name: tuple(stored[name].shape) for name in stored}

    def test_a_killed_run_goes_on_to_the_same_bits(self, variant, sources, results, tmp_path):
        # catches a resume that measures other signals, or starts again
        seen = []

        def die(report):
            seen.append(report.layer)
            if seen == [0, 1]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sliced(sources[variant], tmp_path, on_layer=die, **SIZES)
        assert not (tmp_path / "sliced").exists()
        folder, report = sliced(sources[variant], tmp_path, on_layer=die, **SIZES)
        assert seen == [0, 1, 2]
        whole, found = StoredTensors(results[variant][0]), StoredTensors(folder)
        assert set(whole) == set(found)
        assert all(torch.equal(whole[name], found[name]) for name in whole)
        assert report == results[variant][1]


@pytest.mark.parametrize("variant", PLAIN)
class TestShared:
    @pytest.mark.parametrize("shape", [0, -1])
    def test_full_size_changes_nothing_and_needs_no_code(self, variant, shape, tmp_path):
        # catches a LayerNorm whose mean is not zero, an epsilon or scale of another size, a head still tied
        source = saved(tmp_path / "source", variant, shapes_of(variant)[shape], tied=True)
        folder, _ = sliced(source, tmp_path, fraction=0, rotation="shared", orientation="random")
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert difference(logits(plain), logits(load_model(source))) < TOLERANCE

    def test_sliced_it_is_plain_and_does_what_projections_do(self, variant, tmp_path):
        # catches a bare norm that is not made by the plain one at fewer dimensions
        source = saved(tmp_path / "source", variant, shapes_of(variant)[0], tied=True)
        folder, report = sliced(source, tmp_path, rotation="shared", **SIZES)
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert not list(folder.glob("*.py"))
        assert type(stock).__module__.startswith("transformers.")
        planned = sliced_parameters(read_config(source), SlicingConfig(rotation="shared", **SIZES))
        assert planned == report.parameters == sum(parameter.numel() for parameter in stock.parameters())
        assert difference(logits(stock), self.projected(source, stock)) < TOLERANCE

    def projected(self, source, stock):
        """The fused source with every signal projected onto the space that the result's embedding and writers span."""
        config, parts = read_config(source), LayerwiseModel(source)
        family = parts.family
        table = stock.get_input_embeddings().weight.double()
        whole = parts.tensors[f"{family.embedding}.weight"].double()
        if family.norm == "layer":
            whole = whole - whole.mean(-1, keepdim=True)
        basis = torch.linalg.lstsq(whole, table).solution  # the basis times a scale
        basis = torch.linalg.svd(basis, full_matrices=False)
        basis = basis.U[:, 1e-4 * basis.S[0] < basis.S]
        share = CalibrationShare(source, TOKENS)
        share.embed()
        for layer in range(parts.num_layers):
            for half in halves_of(config):
                share.follow(layer, half, basis)
        hidden = share._hidden[0].double() @ basis @ basis.T
        epsilon = getattr(parts.materialised(family.final_norm), family.norm_epsilon)
        normed = hidden * (hidden.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
        (head,) = fused_head(family, parts.tensors)
        return torch.nn.functional.linear(normed, head.weight, head.bias)

    def test_a_killed_run_goes_on_to_the_same_bits(self, variant, sources, tmp_path):
        seen = []

        def die(report):
            seen.append(report.layer)
            if seen == [0, 1]:
                raise KeyboardInterrupt

        settings = {"rotation": "shared", "hidden_size": 12}
        with pytest.raises(KeyboardInterrupt):
            sliced(sources[variant], tmp_path / "a", on_layer=die, **settings)
        folder, _ = sliced(sources[variant], tmp_path / "a", on_layer=die, **settings)
        assert seen == [0, 1, 2]
        whole, found = StoredTensors(sliced(sources[variant], tmp_path / "b", **settings)[0]), StoredTensors(folder)
        assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(SLICEABLE)))
def test_families_with_norms_after_the_blocks_are_refused(variant, sources, tmp_path):
    assert FAMILIES[variant.split()[0]].post_norms
    with pytest.raises(UserError, match="end in a norm of their own"):
        sliced(sources[variant], tmp_path)


@pytest.mark.parametrize("variant", sorted(set(SLICEABLE) - set(PLAIN)))
def test_shared_rotation_is_refused_where_heads_would_have_to_shrink(variant, sources):
    (problem,) = check_slicing(read_config(sources[variant]), SlicingConfig(rotation="shared"))
    assert "slicing.rotation=per_signal" in problem


def test_shares_add_up(sources, tmp_path):
    """Catches a share that is not summed: the result must not depend on how the text is spread."""
    one, _ = sliced(sources["llama"], tmp_path / "one", **SIZES)
    three, _ = sliced(sources["llama"], tmp_path / "three", texts=TEXT.split([3, 5, 2]), **SIZES)
    assert difference(logits(load_model(three)), logits(load_model(one))) < TOLERANCE
    with pytest.raises(UserError, match="another calibration text"):
        sliced(sources["llama"], tmp_path / "one", texts=TEXT.split(5), **SIZES)


def test_shares_elsewhere_would_do(sources):
    """The driver asks for nothing but these methods, with arguments and results that travel."""
    here = shares(sources["opt"], TEXT)
    here.map("embed")
    assert here.map("follow", 0, "attention", None) == [None]
    (covariance,) = here.map("covariance")
    assert covariance.dtype == torch.float64
    assert covariance.device.type == "cpu"


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Catches layers, rotations or masks that are kept once they are used: bytes of tensors alive after each layer."""

    def most_bytes(num_layers):
        shape = shapes_of("llama")[-1].model_copy(update={"num_layers": num_layers, "intermediate_size": 200})
        source = saved(tmp_path / f"source-{num_layers}", "llama", shape)
        seen = []
        before = alive()
        sliced(source, tmp_path / str(num_layers), on_layer=lambda _: seen.append(alive() - before), **SIZES)
        assert len(seen) == num_layers
        return max(seen)

    def alive():
        gc.collect()
        found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and not item.is_meta]
        return sum(
            {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, found)}.values()
        )

    few, many = most_bytes(3), most_bytes(12)
    assert few > 0
    assert many <= few
