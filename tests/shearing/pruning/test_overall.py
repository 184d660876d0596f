"""The overall constraint against outer products over every single weight, and against the published figures."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import GROUPED, MULTI_HEAD, tiny_config

from shearing.models.families import FAMILIES
from shearing.models.family import llama_config
from shearing.models.parameters import parameter_sizes, prunable_parameters
from shearing.models.shape import Shape
from shearing.pruning.gates import open_probability
from shearing.pruning.lagrangian import constraint, ramped_sparsity
from shearing.pruning.overall import OverallSparsity

GOLDEN = Path(__file__).parents[4] / "shared/golden/gates/l0_A_layersep_notarget"
NAMES = {"head": "head", "head_layer": "attention_layer", "mlp": "mlp_layer", "intermediate": "intermediate"}
CASES = [
    ("llama", MULTI_HEAD),
    ("llama", GROUPED),
    ("qwen2", GROUPED),
    ("mistral", GROUPED),
    ("phi3", GROUPED),
    ("gemma2", GROUPED),
    ("olmo2", MULTI_HEAD),
    ("phi", GROUPED),
]
RANDOM = torch.Generator().manual_seed(4)


def random_gates(shape):
    layers, ratio = shape.num_layers, shape.num_heads // shape.num_kv_heads
    sizes = {
        "hidden": (shape.hidden_size,),
        "head": (layers, shape.num_heads if ratio == 1 else ratio),
        "intermediate": (layers, shape.intermediate_size),
        "attention_layer": (layers,),
        "mlp_layer": (layers,),
    }
    if ratio > 1:
        sizes["kv_head"] = (layers, shape.num_kv_heads)
    return {name: torch.rand(size, generator=RANDOM, dtype=torch.float64) for name, size in sizes.items()}


def by_every_weight(variant, shape, gates):
    """The same count from the product of gates of every single weight of every projection."""
    config, family = tiny_config(variant, shape), FAMILIES[variant]
    ratio, size, total = shape.num_heads // shape.num_kv_heads, shape.head_size, 0.0
    for layer in range(shape.num_layers):
        hidden, unit = gates["hidden"], gates["intermediate"][layer]
        if ratio == 1:
            query = key = gates["head"][layer]
        else:
            key = gates["kv_head"][layer]
            query = torch.stack([k * q for k in key for q in gates["head"][layer]])
        query, key = query.repeat_interleave(size), key.repeat_interleave(size)
        fused = family.qkv_rows != "apart"
        rows = (
            {family.query: torch.cat([query, key, key])}
            if fused
            else {family.query: query, family.key: key, family.value: key}
        )
        rows |= (
            {family.up: torch.cat([unit, unit])} if family.gate == family.up else {family.gate: unit, family.up: unit}
        )
        for name, size_of in parameter_sizes(config).items():
            inside = name.removeprefix(f"{family.layers}.{layer}.")
            module, _, kind = inside.rpartition(".")
            half = gates["mlp_layer" if module in (family.gate, family.up, family.down) else "attention_layer"][layer]
            if inside == name:
                continue
            if module in rows:
                found = rows[module][:, None] * hidden if kind == "weight" else rows[module]
            elif module in (family.output, family.down):
                inner = query if module == family.output else unit
                found = hidden[:, None] * inner if kind == "weight" else hidden
            else:
                continue
            assert tuple(found.shape) == size_of, name
            total += float(half * found.sum())
    return total


class TestCount:
    @pytest.mark.parametrize(("variant", "shape"), CASES)
    def test_is_the_product_over_every_weight(self, variant, shape):
        # catches a product of means where rows differ, biases left out, keys counted a query, layers mixed up
        gates = random_gates(shape)
        overall = OverallSparsity(tiny_config(variant, shape), 0.5)
        assert float(overall.count(gates)) == pytest.approx(by_every_weight(variant, shape, gates), rel=1e-9)
        assert float(overall.count({})) == prunable_parameters(tiny_config(variant, shape)) == overall.total

    @pytest.mark.skipif(not GOLDEN.with_suffix(".json").exists(), reason="no golden gates beside this checkout")
    @pytest.mark.parametrize("state", ["init", "spread", "trained_like"])
    def test_published_constraint_and_gradients(self, state):
        # catches another sum than the published one, which has heads, half-layers and intermediate units
        info, arrays = json.loads(GOLDEN.with_suffix(".json").read_text()), np.load(GOLDEN.with_suffix(".npz"))
        shape = Shape(num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=4, head_size=16, intermediate_size=172)
        overall = OverallSparsity(llama_config(shape, 97, 256), info["target_sparsity"])
        assert overall.total == info["prunable_model_size"]
        log_alpha = {
            ours: torch.tensor(arrays[f"{state}/z_loga/{theirs}"]).requires_grad_() for theirs, ours in NAMES.items()
        }
        open_p = {name: open_probability(a) for name, a in log_alpha.items()}
        assert float(overall.count(open_p).detach()) == pytest.approx(
            info["states"][state]["expected_num_params"], rel=1e-6
        )
        linear, quadratic = (
            torch.tensor(info["lambdas"][name], requires_grad=True) for name in ("lambda_1", "lambda_2")
        )
        for step in info["steps"]:
            theirs = info["states"][state]["lagrangian"][str(step)]
            expected = overall.expected(open_p)
            assert float(expected.detach()) == pytest.approx(theirs["info"]["expected_sparsity"], abs=1e-5)
            target = ramped_sparsity(0.5, step, info["lagrangian_warmup_steps"], 0.1)
            loss = constraint(expected, target, linear, quadratic)
            assert float(loss.detach()) == pytest.approx(theirs["loss"], abs=1e-5)
            if step == 50:
                loss.backward(retain_graph=True)
        for theirs, ours in NAMES.items():
            torch.testing.assert_close(
                log_alpha[ours].grad, torch.tensor(arrays[f"{state}/lag50_grad_zloga/{theirs}"]), atol=1e-5, rtol=0
            )
        multipliers = info["states"][state]["lag50_grad_lambda"]
        assert float(linear.grad) == pytest.approx(multipliers["lambda_1"], abs=1e-5)
        assert float(quadratic.grad) == pytest.approx(multipliers["lambda_2"], abs=1e-5)


class TestChoice:
    @pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83, 0.99])
    @pytest.mark.parametrize(("variant", "shape"), CASES)
    def test_at_or_under_the_budget_and_no_unit_more_fits(self, variant, shape, sparsity):
        # catches a result above what was asked, one that stops a whole layer short, and half-layers left hollow
        overall, scores = OverallSparsity(tiny_config(variant, shape), sparsity), random_gates(shape)
        chosen = overall.choose(scores)
        gates = {name: gate.double() for name, gate in chosen.items()}
        left = int(overall.count(gates))
        assert left <= overall.budget
        for half, inside in (("attention_layer", "head"), ("mlp_layer", "intermediate")):
            assert torch.equal(chosen[half], chosen[inside].any(-1))
        for layer, unit in itertools.product(range(3), range(shape.intermediate_size)):
            more = {name: gate.clone() for name, gate in gates.items()}
            if chosen["mlp_layer"][layer] and not chosen["intermediate"][layer, unit]:
                more["intermediate"][layer, unit] = 1.0
                assert int(overall.count(more)) > overall.budget
        assert int(gates["hidden"].sum()) >= 1

    def test_takes_the_smallest_scores(self):
        # catches an order within groups only, and one that is turned round
        overall = OverallSparsity(tiny_config("llama", MULTI_HEAD), 0.3)
        scores = {name: random_gates(MULTI_HEAD)[name] for name in ("intermediate", "mlp_layer")}
        scores["mlp_layer"] += 1
        chosen = overall.choose(scores)["intermediate"]
        assert scores["intermediate"][chosen].min() > scores["intermediate"][~chosen].max()
        assert len(set(chosen.sum(-1).tolist())) > 1  # rows of their own lengths

    def test_forced_units(self):
        # catches a list of layers that only a target shape obeys
        overall, scores = OverallSparsity(tiny_config("llama", MULTI_HEAD), 0.6), random_gates(MULTI_HEAD)
        for half in ("attention_layer", "mlp_layer"):
            scores[half][0], scores[half][2] = float("inf"), float("-inf")
        chosen = overall.choose(scores)
        assert chosen["attention_layer"].tolist()[::2] == chosen["mlp_layer"].tolist()[::2] == [True, False]

    def test_of_equal_scores_the_later_goes_first(self):
        overall = OverallSparsity(tiny_config("llama", MULTI_HEAD), 0.02)
        chosen = overall.choose({"intermediate": torch.zeros(3, 20)})
        assert chosen["intermediate"][0].all()
        assert not chosen["intermediate"][2, -1]


@pytest.mark.parametrize("left_out", [(), ("hidden",), ("attention_layer", "mlp_layer")])
def test_nothing_gets_below_the_least(left_out):
    """A target that is let through though no choice of gates can come to it, or refused though one can."""
    overall = OverallSparsity.of_all(tiny_config("llama", GROUPED), 1)
    gates = {name: gate for name, gate in random_gates(GROUPED).items() if name not in left_out}
    kept = () if left_out == ("attention_layer", "mlp_layer") else (1,)
    scores = {name: gate.clone() for name, gate in gates.items()}
    for half in ("attention_layer", "mlp_layer"):
        for layer in kept:
            scores[half][layer] = math.inf
    chosen = overall.choose(scores)
    assert int(overall.count(chosen)) == overall.least(gates, kept)
