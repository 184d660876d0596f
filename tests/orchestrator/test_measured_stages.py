"""The stages that slice and sparsify, and what becomes of their work while they measure."""

import io
import math
from types import SimpleNamespace

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator import slicing_stage, sparsifying_stage
from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.stage import Context
from orchestrator.workspace import open_workspace
from shearing.storage import open_store

LOSSES = {"wiki": 2.0, "code": 3.0}
RECORD = {"pattern": "2:4", "method": "magnitude", "weights": 10, "zeros": 5, "achieved_fraction": 0.5}
STAGES = {
    "slicing": (slicing_stage, "slice_on_cluster", slicing_stage.run_slicing),
    "sparsifying": (sparsifying_stage, "sparsify_on_cluster", sparsifying_stage.run_sparsifying),
}


@pytest.mark.parametrize("section", STAGES)
def test_work_is_kept_until_all_is_measured(tmp_path, monkeypatch, section):
    """Catches finished layers that a stop in one of the measurements after them throws away."""
    module, makes, run = STAGES[section]
    recipe = tiny_recipe(tmp_path, f"{section}={{}}")
    workspace = open_workspace(recipe)
    context = Context(recipe, workspace, Console(io.StringIO()), RaySession(recipe))
    context.outputs["source"] = {"model": str(tmp_path / "model")}
    context.outputs["corpus"] = {"path": str(tmp_path / "corpora")}
    context.outputs["references"] = {"kind": "source", "losses": LOSSES}
    stops = {"in measuring": True}

    def make(settings, *_told):
        open_store(settings.work).write_json("layer.json", {})
        config = (tmp_path / "model/config.json").read_bytes()
        open_store(settings.destination).write_bytes("config.json", config)
        return SimpleNamespace(kept_variance=[], parameters=7) if section == "slicing" else RECORD

    def measure(*_arguments, **_resources):
        if stops["in measuring"]:
            raise KeyboardInterrupt
        return LOSSES

    monkeypatch.setattr(module, makes, make)
    monkeypatch.setattr(module, "measure_losses", measure)
    monkeypatch.setattr(module, "residual_parameters", lambda _config: 0, raising=False)
    monkeypatch.setattr(module, "_rotated", lambda context: module._measured(context, "rotated"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(context)
    assert workspace.store.exists(f"{section}/layer.json")
    stops["in measuring"] = False
    assert run(context)["model"] == workspace.store.child("sliced" if section == "slicing" else "sparse").uri
    assert not workspace.store.exists(section)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_proves_nothing(value):
    """Catches a proof that skips the one domain whose rotated model is broken, as max() does with a NaN."""
    dense = {"domains": {"wiki": 2.0, "code": 3.0, "web": 4.0}}
    for domain in dense["domains"]:
        proof = {"dense": dense, "rotated": {"domains": dense["domains"] | {domain: value}}}
        assert not slicing_stage.rotation_agreement(proof, "float32")["agrees"]
    both = {"domains": {"wiki": value}}
    assert not slicing_stage.rotation_agreement({"dense": both, "rotated": both}, "float32")["agrees"]
    assert slicing_stage.rotation_agreement({"dense": dense, "rotated": dense}, "float32")["agrees"]
