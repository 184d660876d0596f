"""What makes methods comparable: equal parameters, one source, one corpus, one recovery."""

import json
from math import prod

import pytest
from recipes_for_tests import tiny_recipe, write_model

from orchestrator.comparison_checks import (
    comparison_problems,
    comparison_recipe,
    plan_comparison,
    render_comparison_plan,
)
from orchestrator.comparison_run import MethodRun, runs_at_once
from orchestrator.methods import (
    METHODS,
    chosen_methods,
    compared_parameters,
    method_recipe,
    on_source,
    planned_parameters,
)
from orchestrator.recipe import COMPARED_METHODS
from orchestrator.source_model import inspect_source
from shearing.errors import UserError
from shearing.models.parameters import count_parameters, parameter_sizes
from shearing.pruning.slicing.plan import sliced_parameters


def comparison(folder, *overrides):
    recipe = comparison_recipe(tiny_recipe(folder, "pruning.gates.groups=null", *overrides))
    return recipe, inspect_source(recipe.only("pruning")).config


def test_the_table_is_whole():
    """A method that can be named and not run."""
    assert set(METHODS) == set(COMPARED_METHODS)


def test_every_method_comes_to_the_parameters_of_the_target_shape(tmp_path):
    """A slicing that counts no residual matrices, a CoFi that counts no embeddings: not what is compared."""
    recipe, config = comparison(tmp_path)
    sizes = {**config, "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    most = sum(prod(size) for size in parameter_sizes({**sizes, "intermediate_size": 128, "head_dim": 16}).values())
    assert compared_parameters(recipe, config) == most
    for name in COMPARED_METHODS:
        derived = method_recipe(name, recipe, config)
        parameters, not_zero = planned_parameters(derived, config)
        if "2_4" in name:
            linears = [prod(s) for n, s in parameter_sizes(config).items() if ".layers." in n and len(s) == 2]
            assert (parameters, not_zero) == (count_parameters(config), count_parameters(config) - sum(linears) // 2)
        elif "slicegpt" in name:
            sizes = range(1, config["hidden_size"] + 1)
            step = 1 if name == "slicegpt" else 4  # a plain llama's hidden size is a multiple of its heads
            fitting = {
                n: count
                for n in sizes
                if n % step == 0
                and (count := sliced_parameters(config, derived.slicing.model_copy(update={"hidden_size": n}))) <= most
            }
            assert derived.slicing.hidden_size == max(fitting)
            assert parameters == not_zero == fitting[max(fitting)]
        else:
            assert parameters == not_zero == most


def test_methods_share_all_but_their_own_section(tmp_path):
    """One method with another recovery, seed or text than the rest."""
    recipe, config = comparison(tmp_path, "slicing={orientation: random}", "sparsifying={calibration: {sequences: 9}}")
    shared = ("corpus", "mixture", "recovery", "evaluation", "seed", "engine", "scores")
    seen = set()
    for name in COMPARED_METHODS:
        run = on_source(name, method_recipe(name, recipe, config), "/base", "/base/source", {"wiki": 2.0, "code": 3.0})
        assert all(getattr(run, section) == getattr(recipe, section) for section in shared)
        assert run.references.values == {"wiki": 2.0, "code": 3.0}
        assert (run.source.model, run.workspace) == ("/base/source", f"/base/methods/{name}")
        asked = {key: getattr(run, key) for key in ("pruning", "slicing", "sparsifying") if getattr(run, key)}
        assert len(asked) == 1, "one way to become smaller"
        seen.add((json.dumps([section.model_dump() for section in asked.values()]), run.scratch is not None))
    assert len(seen) == len(COMPARED_METHODS), "two methods are the same run"
    sliced = method_recipe("slicegpt", recipe, config).slicing
    assert sliced.orientation == "random", "what the recipe says of slicing beside its size holds"
    assert method_recipe("sparsegpt_2_4", recipe, config).sparsifying.calibration.sequences == 9


def test_each_run_makes_the_models_that_are_measured(tmp_path):
    """A folder that no stage of the method writes: found out after all the training."""
    recipe, config = comparison(tmp_path)
    made = {"extraction": "pruned", "slicing": "sliced", "sparsifying": "sparse", "recovery": "model"}
    for name, method in METHODS.items():
        stages = [stage.name for stage in MethodRun(name, method_recipe(name, recipe, config)).stages]
        folders = {made.get(stage, stage) for stage in stages}
        assert {method.after, method.before or method.after} <= folders
        assert "scores" not in stages
        assert ("recovery" in stages) == (name != "scratch")


def test_an_unknown_method(tmp_path):
    with pytest.raises(UserError, match=r"no method 'slicegtp'; allowed: learned, .*Did you mean slicegpt\?"):
        tiny_recipe(tmp_path, "comparison.methods=[learned, slicegtp]")


def test_what_a_family_does_not_allow_is_left_out_unless_named(tmp_path):
    """A comparison on OPT that ends at CoFi, or leaves out without a word what was asked for."""
    recipe, _ = comparison(tmp_path)
    opt = {"model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 64, "do_layer_norm_before": True}
    write_model(tmp_path / "model", **opt)
    recipe = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update={"target": _opt_target(recipe)})})
    names, left_out = chosen_methods(recipe, inspect_source(recipe.only("pruning")))
    assert set(left_out) >= {"cofi"}
    assert "head size" in left_out["cofi"]
    assert names == [name for name in COMPARED_METHODS if name not in left_out]
    asked = recipe.model_copy(update={"comparison": recipe.comparison.model_copy(update={"methods": ["cofi"]})})
    assert any(problem.startswith("method cofi: ") for problem in comparison_problems(asked))


def _opt_target(recipe):
    return recipe.pruning.target.model_copy(update={"num_heads": 3, "intermediate_size": 128})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pruning.target={sparsity: 0.5}"], "pruning.target gives no sizes"),
        (["comparison.text={file: /nowhere.txt}"], "comparison.text.file = '/nowhere.txt' is no file"),
        (
            [f"comparison.text={{file: {__file__}, window_tokens: 513}}"],
            "comparison.text: window = 513 tokens; the sou",
        ),
        (
            [f"comparison.text={{file: {__file__}, window_tokens: 64, stride_tokens: 64, bos: true}}"],
            "comparison.text: stride = 64 tokens would leave tokens out: a window of 64 holds 63",
        ),
        (["recovery.lora={rank: 2}", "comparison.methods=[sparsegpt_2_4]"], "method sparsegpt_2_4: recovery.lora"),
        (["slicing.calibration.sequences=4", "pruning.target.num_heads=5"], "num_heads = 5"),
    ],
)
def test_problems_are_told_before_anything_starts(tmp_path, overrides, expected):
    recipe, _ = comparison(tmp_path, *overrides)
    found = comparison_problems(recipe)
    assert any(expected in problem for problem in found), found
    assert expected in render_comparison_plan(plan_comparison(recipe))


def test_a_comparison_without_faults_has_none(tmp_path):
    recipe, config = comparison(tmp_path)
    assert comparison_problems(recipe) == []
    text = render_comparison_plan(plan_comparison(recipe))
    assert text.count(f"{compared_parameters(recipe, config):,}") >= 7
    assert "nothing is missing" in text
    assert not (tmp_path / "run").exists(), "--plan writes nothing"


@pytest.mark.parametrize(
    ("section", "cpus", "gpus", "expected"),
    [
        ({}, 9.0, None, 3),  # two workers of half a CPU, and two for reading: three a run
        ({}, 2.0, None, 1),  # too small for one: the session refuses that, not this
        ({"workers": 1}, 10.0, None, 4),
        ({"at_once": 2}, 9.0, None, 2),
        ({"at_once": 8}, 9.0, None, 3),
        ({"at_once": 5}, None, None, 5),  # Ray is embedded: it declares what is asked for
    ],
)
def test_no_more_runs_at_once_than_there_is_room_for(tmp_path, section, cpus, gpus, expected):
    """Runs that wait for each other's CPUs, or that read with none to spare."""
    listed = ", ".join(f"{key}: {value}" for key, value in section.items())
    recipe, _ = comparison(tmp_path, f"comparison={{{listed}}}")
    assert runs_at_once(recipe, cpus, gpus) == expected


def test_gpus_bound_the_runs_at_once(tmp_path):
    recipe, _ = comparison(tmp_path, "engine.gpus_per_worker=1", "comparison={at_once: 8}")
    assert runs_at_once(recipe, None, 6.0) == 3
    assert runs_at_once(recipe, 100.0, 4.0) == 2
