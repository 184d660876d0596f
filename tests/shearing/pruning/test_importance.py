"""Scores against what Hugging Face's own modules compute and against loops over units."""

import pytest
import torch
from tiny_models import GROUPED, MULTI_HEAD, TOKENS, VARIANTS, shapes_of, tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from shearing.models.families import FAMILIES
from shearing.pruning.importance import (
    activation_scores,
    choose_units,
    magnitude_scores,
    random_scores,
    removal_scores,
)
from shearing.pruning.target import GroupSpec

LLAMA = FAMILIES["llama"]
BATCHES = [TOKENS, (TOKENS * 3 + 1) % 61, TOKENS[:1].flip(1)]  # of unequal numbers of sequences


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", GROUPED)


@pytest.fixture(scope="module")
def scores(model):
    return activation_scores(model, LLAMA, GROUPED, BATCHES)


def mean_then_root(sizes):
    """The paper's pair of aggregations, over [N, T, X] of all batches, written with loops."""
    sequences = [size_TX.mean(0) for size_NTX in sizes for size_TX in size_NTX]
    return sum(size_X.double() ** 2 for size_X in sequences).sqrt().float()


@torch.no_grad()
def seen_inside(model, tokens):
    """What goes into every attention and MLP, and every residual stream, by other modules than the scores watch."""
    inputs, handles = {}, []
    for number, layer in enumerate(model.model.layers):
        for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):

            def keep(_module, args, options, key=(name, number)):
                inputs[key] = args[0] if args else options["hidden_states"]

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    norm, model.model.norm = model.model.norm, torch.nn.Identity()  # the last stream as it is
    streams = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    model.model.norm = norm
    for handle in handles:
        handle.remove()
    return inputs, streams


class TestActivations:
    def test_hidden(self, model, scores):
        # catches a norm left out, signs that cancel, sums over sequences in place of the L2 norm
        expected = torch.zeros(GROUPED.hidden_size)
        seen = [seen_inside(model, tokens) for tokens in BATCHES]
        for key in [(kind, layer) for kind in ("attention", "mlp") for layer in range(GROUPED.num_layers)]:
            expected += mean_then_root([inputs[key].abs() for inputs, _ in seen])
        with torch.no_grad():
            expected += mean_then_root([model.model.norm(streams[-1]).abs() for _, streams in seen])
        torch.testing.assert_close(scores["hidden"], expected)

    def test_intermediate(self, model, scores):
        # catches the gate or the up half alone
        for layer in range(GROUPED.num_layers):
            mlp = model.model.layers[layer].mlp
            with torch.no_grad():
                inner = [seen_inside(model, tokens)[0]["mlp", layer] for tokens in BATCHES]
                sizes = [(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).abs() for x in inner]
            torch.testing.assert_close(scores["intermediate"][layer], mean_then_root(sizes))

    def test_heads_and_their_groups(self, model, scores):
        # catches heads cut at the wrong columns, and queries of one group given to another
        eager = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
        eager.load_state_dict(model.state_dict())
        for layer in range(GROUPED.num_layers):
            sizes = []
            for tokens in BATCHES:
                with torch.no_grad():
                    weights_NHTT = eager.eval()(input_ids=tokens, output_attentions=True).attentions[layer]
                    x_NTD = seen_inside(model, tokens)[0]["attention", layer]
                    value_NTKP = model.model.layers[layer].self_attn.v_proj(x_NTD).unflatten(-1, (2, 8))
                heads = [weights_NHTT[:, h] @ value_NTKP[:, :, h // 3] for h in range(6)]
                sizes.append(torch.stack([head.square().sum(-1).sqrt() for head in heads], dim=-1))
            head_H = mean_then_root(sizes)
            torch.testing.assert_close(scores["kv_head"][layer], torch.stack([head_H[:3].sum(), head_H[3:].sum()]))
            torch.testing.assert_close(scores["head"][layer], head_H[:3] + head_H[3:])

    def test_multi_head_attention_scores_heads(self):
        found = activation_scores(tiny_model("llama", MULTI_HEAD), LLAMA, MULTI_HEAD, BATCHES)
        assert found["head"].shape == (3, 4)
        assert "kv_head" not in found

    def test_block_influence(self, model, scores):
        # catches the cosine itself in place of what it lacks of 1, and a mean over batches of unequal size
        seen = [seen_inside(model, tokens)[1] for tokens in BATCHES]
        for layer in range(GROUPED.num_layers):
            pairs = [
                (a, b) for s in seen for a, b in zip(s[layer].flatten(0, 1), s[layer + 1].flatten(0, 1), strict=True)
            ]
            cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
            assert float(scores["layer"][layer]) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)

    def test_leave_nothing_behind(self, model):
        # catches hooks that go on watching, or gates that stay
        def hooks():
            return sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()
            )

        before, hooked = model(input_ids=TOKENS).logits, hooks()
        activation_scores(model, LLAMA, GROUPED, BATCHES)
        removal_scores(model, LLAMA, GROUPED, BATCHES)
        assert torch.equal(model(input_ids=TOKENS).logits, before)
        assert hooks() == hooked


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_can_be_scored(variant):
    # catches a name or a shape that only one family has
    for shape in shapes_of(variant):
        model, family = tiny_model(variant, shape), FAMILIES[variant.split()[0]]
        removal = removal_scores(model, family, shape, BATCHES)
        expected = {"hidden": (shape.hidden_size,), "intermediate": (3, 20), "head": (3, 4), "layer": (3,)}
        if shape is GROUPED:
            expected |= {"head": (3, 3), "kv_head": (3, 2)}
        for found in (activation_scores(model, family, shape, BATCHES), magnitude_scores(model, family, shape)):
            assert {name: tuple(score.shape) for name, score in found.items()} == expected
            assert all(torch.isfinite(score).all() and score.max() > 0 for score in [*found.values(), removal])


def test_removal_is_the_loss_of_a_model_without_the_layer(model):
    # catches a layer that is scaled and not removed, and losses averaged over batches in place of tokens
    found = removal_scores(model, LLAMA, GROUPED, BATCHES)
    for layer in range(GROUPED.num_layers):
        whole = model.model.layers
        model.model.layers = torch.nn.ModuleList([block for number, block in enumerate(whole) if number != layer])
        with torch.no_grad():
            losses = [
                functional.cross_entropy(model(input_ids=row[None], use_cache=False).logits[0, :-1], row[1:])
                for tokens in BATCHES
                for row in tokens
            ]
        model.model.layers = whole
        assert float(found[layer]) == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def test_magnitudes_by_loops(model):
    # catches rows for columns, and a head's columns cut at another size
    found = magnitude_scores(model, LLAMA, GROUPED)
    layer = model.model.layers[1]
    output, down = layer.self_attn.o_proj.weight.detach(), layer.mlp.down_proj.weight.detach()
    assert float(found["intermediate"][1, 7]) == pytest.approx(float(down[:, 7].norm()), rel=1e-5)
    heads = [float(output[:, 8 * head : 8 * head + 8].norm()) for head in range(6)]
    assert found["kv_head"][1].tolist() == pytest.approx([sum(heads[:3]), sum(heads[3:])], rel=1e-5)
    assert found["head"][1].tolist() == pytest.approx([heads[q] + heads[3 + q] for q in range(3)], rel=1e-5)
    assert float(found["layer"][1]) == pytest.approx(float((output.norm() ** 2 + down.norm() ** 2).sqrt()), rel=1e-5)
    total = model.model.embed_tokens.weight.detach()[:, 5].norm() ** 2
    for block in model.model.layers:
        total = total + block.self_attn.o_proj.weight.detach()[5].norm() ** 2
        total = total + block.mlp.down_proj.weight.detach()[5].norm() ** 2
    assert float(found["hidden"][5]) == pytest.approx(float(total.sqrt()), rel=1e-5)


class TestChoice:
    def test_the_largest_of_every_row(self):
        # catches one ranking for all layers
        groups = {"head": GroupSpec(4, 2, 2)}
        gates = choose_units({"head": torch.tensor([[1.0, 9.0, 3.0, 2.0], [-1.0, -2.0, -3.0, -0.5]])}, groups)
        assert gates["head"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]

    def test_forced_units_whatever_their_score(self):
        # catches a list that only learned gates obey; equal scores keep the earlier unit
        groups = {"layer": GroupSpec(6, 3, kept=(5,), dropped=(1,))}
        gates = choose_units({"layer": torch.tensor([2.0, 1e30, 2.0, 2.0, 1.0, -1e30])}, groups)
        assert gates["layer"].tolist() == [1, 0, 1, 0, 0, 1]

    def test_random_is_of_the_seed_alone(self):
        groups = {"hidden": GroupSpec(50, 20), "head": GroupSpec(4, 2, 3)}
        one, again, other = (random_scores(groups, seed) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], again[name]) for name in groups)
        assert not torch.equal(one["hidden"], other["hidden"])
        assert choose_units(one, groups)["hidden"].sum() == 20
