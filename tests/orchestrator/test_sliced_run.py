"""A run that slices, before it starts: its stages, sizes, parameters, and what is refused."""

import json

import pytest
from recipes_for_tests import tiny_recipe, write_model

from orchestrator.plan import plan
from orchestrator.plan_text import render_plan
from orchestrator.preflight import preflight
from orchestrator.run import stages_of
from orchestrator.source_model import result_parameters
from shearing.models.loading import new_model
from shearing.pruning.slicing.plan import sliced_config


def sliced_recipe(folder, *overrides):
    return tiny_recipe(folder, *overrides).only("slicing")


def test_one_recipe_serves_both_methods(tmp_path):
    """Catches a sheared run that slices as well, and two runs that share a workspace nobody named."""
    recipe = tiny_recipe(tmp_path, "slicing.fraction=0.5", "scratch={}", "workspace=null")
    sheared, sliced = recipe.only("pruning"), recipe.only("slicing")
    assert [stage.name for stage in stages_of(sheared)] == [
        "corpus", "source", "references", "pruning", "extraction", "recovery", "scratch", "scores", "report",
    ]  # fmt: skip
    names = ["corpus", "source", "references", "slicing", "recovery", "scores", "report"]
    assert [stage.name for stage in stages_of(sliced)] == names
    assert (sheared.workspace, sliced.workspace) == (None, "runs/tiny-sliced")
    assert sliced.slicing.fraction == 0.5
    assert tiny_recipe(tmp_path).only("slicing").slicing.calibration.sequences == 128
    alone = tiny_recipe(tmp_path, "recovery=null").only("slicing")
    assert [stage.name for stage in stages_of(alone)] == [name for name in names if name != "recovery"]


@pytest.mark.parametrize("slicing", ["{hidden_size: 40}", "{fraction: 0.3, head: true}", "{rotation: shared}"])
def test_the_plan_counts_what_the_model_holds(tmp_path, slicing):
    """A plan without residual matrices promises a smaller model than comes out."""
    recipe = sliced_recipe(tmp_path, f"slicing={slicing}")
    found = plan(recipe)
    config = json.loads((tmp_path / "model/config.json").read_text())
    model = new_model(sliced_config(config, recipe.slicing))
    expected = sum(parameter.numel() for parameter in model.parameters())
    residual = sum(p.numel() for name, p in model.named_parameters() if name.endswith("residual"))
    assert found.problems == []
    assert found.models[1].parameters == result_parameters(recipe, config) == expected
    assert found.models[1].residual_parameters == residual
    assert found.models[1].directory_bytes == 4 * expected
    assert found.phases[0].memory.optimizer == 12 * expected / 2
    text = render_plan(found)
    assert f"{expected:,}" in text
    assert ("residual matrices" in text) == bool(residual)


def test_the_plan_says_what_will_happen(tmp_path):
    text = render_plan(
        plan(sliced_recipe(tmp_path, "slicing={schedule: [0, 0.25, 0.25, 0.5]}", "recovery.lora.rank=8"))
    )
    for expected in (
        "rotated and sliced, layer by layer",
        "2 of 64 -> 64, then 4 of 64 -> 48, then 2 of 64 -> 32, then 1 of 64 -> 64",
        "one rotation a signal",
        "principal directions; on 128 sequences of calibration text",
        "rank 8, alpha 10",
        f"source        what lies in {tmp_path}/model",
        "nothing is missing",
    ):
        assert expected in text, expected
    assert "gates" not in text.split("training")[0]


def test_adapters_are_those_of_the_sliced_model(tmp_path):
    """Counted at the source's sizes, a checkpoint is promised that is too large."""
    recipe = sliced_recipe(tmp_path, "slicing.hidden_size=40", "recovery.lora={rank: 8, targets: [attention]}")
    per_layer = 3 * (40 + 64) + (64 + 40)  # queries, keys and values read 40 dimensions; the output writes 40
    last = 3 * (40 + 64) + (64 + 40)
    assert plan(recipe).phases[0].checkpoint_bytes == 12 * 8 * (3 * per_layer + last)


BAD = [
    (["slicing={fraction: 0.2, hidden_size: 40}"], {}, "slicing has fraction and hidden_size; allowed: one of them"),
    (["slicing.hidden_size=65"], {}, "slicing.hidden_size = 65 is more than the source's 64"),
    (["slicing.fraction=0.99"], {}, "slicing.fraction keeps no dimension"),
    (["slicing.schedule=[0.1, 0.2]"], {}, "slicing.schedule has 2 entries for 4 layers"),
    (["slicing={rotation: shared, schedule: [0.1, 0.1, 0.1, 0.1]}"], {}, "slicing.schedule gives signals sizes"),
    ([], {"model_type": "olmo2"}, "whose attention and MLP end in a norm of their own"),
    (["recovery.lora.rank=41", "slicing.hidden_size=40"], {}, "allowed: 1 to 40. Set recovery.lora.rank=40"),
    (["corpus.split.prune=0.00001"], {}, "where slicing takes its calibration text from"),
    (["recovery.warmup_steps=21"], {}, "recovery.warmup_steps = 21 is longer"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "config", "expected"), BAD, ids=[expected[:40] for *_, expected in BAD])
def test_what_would_fail_later_is_refused_now(tmp_path, overrides, config, expected):
    recipe = sliced_recipe(tmp_path, *overrides)
    write_model(tmp_path / "model", **config)
    found = preflight(recipe)
    assert any(expected in problem for problem in found), found


def test_a_target_that_no_one_uses_is_not_checked(tmp_path):
    """A recipe may hold a section for another method that does not fit this one's source."""
    assert preflight(sliced_recipe(tmp_path, "pruning.target.num_heads=9", "pruning.warmup_steps=99")) == []
