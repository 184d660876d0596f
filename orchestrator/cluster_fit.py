"""Whether a cluster's nodes hold what a job wants at the same time: every process whole on one node."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.scoring_settings import task_resources


@dataclass(frozen=True)
class Demand:
    """Equal processes that are wanted at the same time.

    Attributes:
        count: How many.
        each: What Ray sets aside for each of them: {"CPU": 4.0, "GPU": 1.0}.
        key: Of the recipe, that says how many; None where their number is not the recipe's to say.
    """

    count: int
    each: dict[str, float]
    key: str | None = None

    @property
    def name(self) -> str:
        """Of it in a sentence."""
        return f"{self.key} = {self.count}" if self.key else f"{self.count} task"


@dataclass(frozen=True)
class ClusterFindings:
    """What only the cluster can tell: problems stop the run, warnings do not."""

    problems: list[str]
    warnings: list[str]


def training_demands(recipe: Recipe) -> list[Demand]:
    """The worker group that a recipe's run cannot do without."""
    engine = recipe.engine
    key = "engine.workers" if isinstance(engine.workers, int) else "engine.workers.min"
    return [_workers(recipe, engine.least_workers, key)]


def comparison_demands(recipe: Recipe) -> list[Demand]:
    """The worker groups of a comparison: of what all methods share, and of each method where its own are given."""
    assert recipe.comparison is not None
    own = recipe.comparison.workers
    return training_demands(recipe) + ([] if own is None else [_workers(recipe, own, "comparison.workers")])


def scoring_demands(recipe: Recipe) -> list[Demand]:
    """A task that holds one model."""
    resources = task_resources(recipe)
    return [Demand(1, {"CPU": resources["cpus"]} | ({"GPU": gpus} if (gpus := resources["gpus"]) else {}))]


def no_demands(_recipe: Recipe) -> list[Demand]:
    """Of a job that takes what cores there are: preparing a corpus."""
    return []


def _workers(recipe: Recipe, count: int, key: str) -> Demand:
    from actors.wishes import resources_per_worker  # with all of torch

    return Demand(count, resources_per_worker(recipe.engine), key)


def cluster_problems(
    demands: Sequence[Demand], nodes: Sequence[dict[str, Any]], autoscaling: bool = False
) -> ClusterFindings:
    """Whether nodes hold what a job asks. `nodes`: the resources of each, as `ray.nodes()` gives them.

    A cluster that grows by itself may get what it lacks, so there it is a warning.
    """
    found = [problem for demand in demands for problem in _problems(demand, nodes)]
    return ClusterFindings([], found) if autoscaling else ClusterFindings(found, [])


def _problems(demand: Demand, nodes: Sequence[dict[str, Any]]) -> list[str]:
    there = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in demand.each}
    short = [
        _too_few(demand, kind, there[kind])
        for kind, each in demand.each.items()
        if each * demand.count > there[kind] + 1e-9
    ]
    if short:
        return short
    if (fitting := _room(demand.each, nodes)) < demand.count:
        return [_in_pieces(demand, fitting, nodes)]
    return []


def _too_few(demand: Demand, kind: str, there: float) -> str:
    each, knob = demand.each[kind], _knob(kind)
    possible = math.floor(there / each + 1e-9)
    remedy = f"Set {demand.key}={possible}" if possible and demand.key else f"Set {knob} to at most {there:g}"
    return (
        f"{demand.name} with {knob} = {each:g} need{'s' * (demand.count == 1)} {each * demand.count:g} {kind}s; the "
        f"cluster has {there:g}. {remedy}, or add nodes."
    )


def _in_pieces(demand: Demand, fitting: int, nodes: Sequence[dict[str, Any]]) -> str:
    wanted = " and ".join(f"{_knob(kind)} = {each:g}" for kind, each in demand.each.items())
    largest = " and ".join(f"{max(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in demand.each)
    lower = " or ".join(_knob(kind) for kind in demand.each)
    remedy = f"Set {demand.key}={fitting}" if fitting and demand.key else f"Set {lower} lower"
    return (
        f"{demand.name} with {wanted}: each has to fit on one node, and the cluster's {len(nodes)} nodes have room for "
        f"{fitting} (at most {largest} on a node). {remedy}, or add larger nodes."
    )


def _room(each: dict[str, float], nodes: Sequence[dict[str, Any]]) -> int:
    from actors.wishes import room_for

    return room_for(each, list(nodes))


def _knob(kind: str) -> str:
    return f"engine.{kind.lower()}s_per_worker"
