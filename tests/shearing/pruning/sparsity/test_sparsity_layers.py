"""A whole model made sparse: against the plain loop over the model in memory; stopped and gone on with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sparsity_calibration import TOKENS, inputs_of, saved
from tiny_models import VARIANTS, shapes_of
from torch import nn
from transformers import AutoModelForCausalLM

from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.models.family import family_of
from shearing.models.loading import load_model, read_config
from shearing.pruning.sparsity.calibration import CalibrationShare, text_digest
from shearing.pruning.sparsity.config import SparsityConfig
from shearing.pruning.sparsity.layers import FinishedLayers, sparse_layers, write_sparse_model
from shearing.pruning.sparsity.sparsegpt import TWO_OF_FOUR, sparsegpt

GOLDEN = Path(__file__).parents[5] / "shared/golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden models beside this checkout")
METHODS = ("sparsegpt", "magnitude", "random")


def sparsified(source, folder, config, tokens=TOKENS):
    share = CalibrationShare(source, tokens) if config.method == "sparsegpt" else None
    text = None if share is None else text_digest(tokens)
    finished = FinishedLayers(folder / "layers", source, config, text)
    for _ in sparse_layers(source, config, share, finished):
        pass
    return write_sparse_model(source, folder / "sparse", config, text, finished)


def layer_linears(model):
    layers = family_of(model.config).layers
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{layers}.")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_ends_where_the_plain_loop_does(variant, tmp_path):
    """Fused projections left dense, layers pruned on what the dense model reads, a head or an embedding pruned too.

    The reference holds the whole model, and looks at what its layers read once those before them are sparse.
    """
    source = saved(tmp_path / "model", variant, shapes_of(variant)[0])
    record = sparsified(source, tmp_path, SparsityConfig())
    expected = load_model(source)
    for layer in range(expected.config.num_hidden_layers):
        inputs = inputs_of(expected, TOKENS, None, layer)
        module = expected.get_submodule(f"{family_of(expected.config).layers}.{layer}")
        for name, x_SI in inputs.items():
            weight = module.get_submodule(name).weight
            weight.data = sparsegpt(weight.data, 2 * x_SI.T @ x_SI, TWO_OF_FOUR)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    for (name, parameter), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4, msg=name)
    assert record["linears"].keys() == layer_linears(found).keys()
    for linear in layer_linears(found).values():
        assert int((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2
    assert (found.lm_head.weight != 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_record_counts_the_zeros_that_are_there(method, tmp_path):
    """A share that was asked for, written down as the one achieved."""
    source = saved(tmp_path / "model")
    config = SparsityConfig(pattern="unstructured", fraction=0.3, method=method)
    record = sparsified(source, tmp_path, config)
    assert record == json.loads((tmp_path / "sparse/sparsity.json").read_text())
    assert (record["pattern"], record["method"], record["fraction"]) == ("unstructured", method, 0.3)
    linears = layer_linears(load_model(tmp_path / "sparse"))
    for name, linear in linears.items():
        entry = record["linears"][name]
        assert entry["zeros"] == int((linear.weight == 0).sum())
        assert entry["fraction"] == entry["zeros"] / linear.weight.numel()
        assert entry["fraction"] == pytest.approx(0.3, abs=0.01)
        assert (entry["relative_error"] is None) == (method != "sparsegpt")
    assert record["zeros"] == sum(int((linear.weight == 0).sum()) for linear in linears.values())
    assert record["achieved_fraction"] == record["zeros"] / sum(linear.weight.numel() for linear in linears.values())
    assert (record["calibration"] is None) == (method != "sparsegpt")
    assert read_config(tmp_path / "sparse") == read_config(source), "a plain model of the same shape"
    assert not (tmp_path / "sparse.partial").exists()


class Counting:
    """Calibration that remembers for which layers sums were asked."""

    def __init__(self, share):
        self.share, self.layers = share, []

    def hessians(self, layer):
        self.layers.append(layer)
        return self.share.hessians(layer)

    def __getattr__(self, name):
        return getattr(self.share, name)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    """Everything done again; or later layers measured behind the dense ones and so another model."""
    source, config = saved(tmp_path / "model"), SparsityConfig()
    sparsified(source, tmp_path / "whole", config)
    runs, text = [], text_digest(TOKENS)
    for layers in (2, 3):
        calibration = Counting(CalibrationShare(source, TOKENS))
        finished = FinishedLayers(tmp_path / "layers", source, config, text)
        for _, _ in zip(range(layers), sparse_layers(source, config, calibration, finished), strict=False):
            pass  # killed after so many
        runs.append(calibration.layers)
    assert runs == [[0, 1], [2]]
    write_sparse_model(source, tmp_path / "resumed", config, text, finished)
    whole, resumed = load_model(tmp_path / "whole/sparse"), load_model(tmp_path / "resumed")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    finished.delete()
    assert not (tmp_path / "layers").exists()


def test_layers_of_other_inputs_are_not_taken(tmp_path):
    """Half a model at 2:4 and half at 30 %; layers of a model that has been trained on since."""
    source, config = saved(tmp_path / "model"), SparsityConfig(method="magnitude")

    def kept(config=config, text=None):
        return FinishedLayers(tmp_path / "layers", source, config, text).records(0) is not None

    def finish():
        for _ in sparse_layers(source, config, None, FinishedLayers(tmp_path / "layers", source, config, None)):
            pass

    finish()
    assert kept()
    assert not kept(SparsityConfig(method="random"))
    finish()
    assert not kept(text="another")
    finish()
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert not kept()


def test_a_layer_half_written_is_not_finished(tmp_path):
    """A crash between two files taken for a layer that is done."""
    source, config = saved(tmp_path / "model"), SparsityConfig(method="magnitude")
    finished = FinishedLayers(tmp_path / "layers", source, config, None)
    next(sparse_layers(source, config, None, finished))
    (tmp_path / "layers/00000.json").unlink()
    assert finished.records(0) is None


@needs_golden
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("llama_gqa", {"pattern": "2:4"}),
        ("llama_gqa", {"pattern": "unstructured", "fraction": 0.7}),  # a half hurts such a model too little to tell
        ("opt", {"pattern": "2:4"}),
        ("phi2", {"pattern": "2:4"}),
    ],
)
def test_trained_models_lose_least_by_sparsegpt(name, pattern, tmp_path):
    """Errors that are spread the wrong way: still 2:4, and worse than dropping the smallest weights."""
    tokens = np.load(GOLDEN / "slicegpt/tokens.npz")
    source, losses = GOLDEN / "models" / name, {}
    calibration = torch.from_numpy(tokens["calib"][:8]).long()
    for method in METHODS:
        sparsified(source, tmp_path / method, SparsityConfig(method=method, **pattern), calibration)
        model = load_model(tmp_path / method / "sparse")
        losses[method] = mean_losses(domain_loss_sums(model, {"text": tokens["eval"][:16]}, 8, "cpu"))["text"]
    dense = mean_losses(domain_loss_sums(load_model(source), {"text": tokens["eval"][:16]}, 8, "cpu"))["text"]
    assert dense < losses["sparsegpt"] < losses["magnitude"] < losses["random"], (dense, losses)
