"""Nodes as Ray lists them against what a recipe's workers take."""

import pytest
from recipes_for_tests import tiny_recipe

from orchestrator.cluster_fit import cluster_problems, comparison_demands, no_demands, scoring_demands, training_demands


@pytest.fixture
def recipe(tmp_path):
    return lambda *overrides: tiny_recipe(tmp_path, *overrides)


def findings(recipe, *nodes, demands=training_demands, autoscaling=False):
    return cluster_problems(demands(recipe), nodes, autoscaling)


def test_a_cluster_that_holds_the_workers_is_enough(recipe):
    assert findings(recipe(), {"CPU": 2.0}).problems == []


def test_more_workers_than_the_cluster_has_are_refused(recipe):
    """Ray waits for resources for ever, or fails after a minute with a timeout that names no knob."""
    (problem,) = findings(recipe("engine.workers=8", "engine.cpus_per_worker=2"), {"CPU": 6.0}, {"CPU": 2.0}).problems
    assert "need 16 CPUs; the cluster has 8. Set engine.workers=4, or add nodes." in problem


def test_gpus_are_asked_of_the_cluster(recipe):
    (problem,) = findings(recipe("engine.gpus_per_worker=1"), {"CPU": 8.0}).problems
    assert "need 2 GPUs; the cluster has 0. Set engine.gpus_per_worker to at most 0" in problem


def test_a_worker_that_no_node_holds_is_refused(recipe):
    """The CPUs of four nodes add up to the worker's, and no node ever has room for it: it waits for ever."""
    nodes = [{"CPU": 4.0}] * 4
    (problem,) = findings(recipe("engine.workers=1", "engine.cpus_per_worker=8"), *nodes).problems
    assert "room for 0 (at most 4 CPUs on a node). Set engine.cpus_per_worker lower" in problem
    (problem,) = findings(recipe("engine.workers=5", "engine.cpus_per_worker=3"), *nodes).problems
    assert "engine.workers = 5 with engine.cpus_per_worker = 3" in problem
    assert "room for 4 (at most 4 CPUs on a node). Set engine.workers=4" in problem
    apart = [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 4.0}]
    (problem,) = findings(
        recipe("engine.workers=1", "engine.cpus_per_worker=2", "engine.gpus_per_worker=1"), *apart
    ).problems
    assert "room for 0" in problem


def test_a_comparisons_own_workers_have_to_fit_too(recipe):
    """A comparison whose methods have more workers than the source's training waits for ever at the first method."""
    nodes = [{"CPU": 5.0}] * 2
    for workers, expected in ((6, "comparison.workers = 6 with engine.cpus_per_worker = 2 need 12 CPUs"), (5, "=4")):
        asked = recipe(f"comparison.workers={workers}", "engine.cpus_per_worker=2")
        (problem,) = findings(asked, *nodes, demands=comparison_demands).problems
        assert expected in problem
        assert findings(asked, *nodes).problems == [], "a run of one method has the engine's workers"


def test_workers_may_take_every_cpu(recipe):
    """Reading asks for none: two cores are enough for two workers of one."""
    assert findings(recipe("engine.cpus_per_worker=1"), {"CPU": 2.0}).problems == []


def test_a_cluster_that_grows_is_only_warned_about(recipe):
    found = findings(recipe("engine.workers=8"), {"CPU": 1.0}, autoscaling=True)
    assert found.problems == []
    assert len(found.warnings) == 1


def test_a_job_asks_for_what_it_takes(recipe):
    """The paper's recipe could be neither tokenised nor scored off its GPU cluster: sixteen GPUs were missing."""
    asked = recipe("engine.workers=16", "engine.gpus_per_worker=1", "engine.cpus_per_worker=4")
    nodes = [{"CPU": 8.0, "GPU": 1.0}]
    assert len(findings(asked, *nodes).problems) == 2
    assert findings(asked, *nodes, demands=scoring_demands).problems == []
    assert findings(asked, {"CPU": 1.0}, demands=no_demands).problems == []
    (problem,) = findings(asked, {"CPU": 8.0}, demands=scoring_demands).problems
    assert "1 task with engine.gpus_per_worker = 1 needs 1 GPUs; the cluster has 0" in problem
