"""The methods that a comparison knows: each one is a recipe derived from the one that is given.

All are brought to the same number of parameters, that of the target shape, embeddings and all included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.recipe import COMPARED_METHODS, Recipe, ScratchConfig
from orchestrator.source_model import SourceFacts
from orchestrator.workspace import workspace_uri
from shearing.models.family import shape_of
from shearing.models.parameters import count_parameters
from shearing.pruning.config import Method as PruningMethod
from shearing.pruning.config import PruningTarget
from shearing.pruning.target import check_pruning, target_shape

Sections = dict[str, Any]


@dataclass(frozen=True)
class ComparedMethod:
    """One method.

    Attributes:
        title: For tables and figures.
        before: Folder of the run that holds the model before recovery; None where there is none worth measuring.
        after: Folder that holds it after.
        sections: Of the derived recipe, from the given one and the source model's config.
        left_out: Stages that a run of this method does without.
    """

    title: str
    before: str | None
    after: str
    sections: Callable[[Recipe, Any], Sections]
    left_out: tuple[str, ...] = ("scores",)


def compared_parameters(recipe: Recipe, source_config: Any) -> int:
    """The number of parameters that every method may keep: the target shape's, all counted."""
    assert recipe.pruning is not None
    return count_parameters(source_config, target_shape(shape_of(source_config), recipe.pruning.target))


def _chosen_by(method: PruningMethod) -> Callable[[Recipe, Any], Sections]:
    def sections(recipe: Recipe, _source_config: Any) -> Sections:
        assert recipe.pruning is not None
        return {"pruning": recipe.pruning.model_copy(update={"method": method})}

    return sections


def _cofi(recipe: Recipe, source_config: Any) -> Sections:
    assert recipe.pruning is not None
    target = PruningTarget(parameters=compared_parameters(recipe, source_config))
    gates = recipe.pruning.gates.model_copy(update={"groups": None})
    return {"pruning": recipe.pruning.model_copy(update={"method": "learned", "target": target, "gates": gates})}


def _scratch(recipe: Recipe, source_config: Any) -> Sections:
    """Chosen at random: the stage takes nothing but the shape of what was extracted."""
    return _chosen_by("random")(recipe, source_config) | {"scratch": recipe.scratch or ScratchConfig()}


METHODS = {
    "learned": ComparedMethod("learned shearing", "pruned", "model", _chosen_by("learned")),
    "cofi": ComparedMethod("CoFi", "pruned", "model", _cofi),
    "magnitude": ComparedMethod("magnitude", "pruned", "model", _chosen_by("magnitude")),
    "activation": ComparedMethod("activation", "pruned", "model", _chosen_by("activation")),
    "block_influence": ComparedMethod("block influence", "pruned", "model", _chosen_by("block_influence")),
    "random": ComparedMethod("random", "pruned", "model", _chosen_by("random")),
    "scratch": ComparedMethod("from scratch", None, "scratch", _scratch, left_out=("scores", "recovery")),
}


def method_recipe(name: str, recipe: Recipe, source_config: Any) -> Recipe:
    """The recipe of one method before its source is known: corpus, workspace and source are the comparison's own."""
    workers = recipe.comparison.workers if recipe.comparison is not None else None
    engine = recipe.engine if workers is None else recipe.engine.model_copy(update={"workers": workers})
    changed = {"name": f"{recipe.name}-{name}", "engine": engine, "scratch": None, "comparison": None}
    return recipe.model_copy(update=changed | METHODS[name].sections(recipe, source_config))


def on_source(name: str, derived: Recipe, base: str, source: str, references: dict[str, float]) -> Recipe:
    """A method's recipe on the comparison's source model, with its reference losses, in a folder of its own.

    Args:
        name: Of the method.
        derived: As `method_recipe` gives it.
        base: Folder or URI of the comparison.
        source: Where the source model lies.
        references: Reference loss by domain.
    """
    fixed = derived.references.model_copy(update={"kind": "values", "values": references, "file": None})
    model = derived.source.model_copy(update={"model": source, "train": None})
    workspace = f"{base.rstrip('/')}/methods/{name}"
    return derived.model_copy(update={"source": model, "references": fixed, "workspace": workspace})


def comparison_uri(recipe: Recipe) -> str:
    """Where a comparison lies: what the recipe says, or runs/<name>-comparison."""
    return workspace_uri(recipe) if recipe.workspace else f"runs/{recipe.name}-comparison"


def misfits(name: str, recipe: Recipe, facts: SourceFacts) -> list[str]:
    """Why a method cannot be had for this source model; an empty list where it can."""
    assert facts.family is not None
    assert facts.shape is not None
    derived = method_recipe(name, recipe, facts.config)
    assert derived.pruning is not None
    return check_pruning(facts.family, facts.shape, derived.pruning, source_config=facts.config)


def chosen_methods(recipe: Recipe, facts: SourceFacts) -> tuple[list[str], dict[str, str]]:
    """The methods that a comparison runs, and why others are left out.

    Methods that the recipe names are kept whether they fit or not: what is wrong with them is a problem to mend.
    """
    named = recipe.comparison.methods if recipe.comparison is not None else None
    if named is not None:
        return [name for name in COMPARED_METHODS if name in named], {}
    reasons = {name: found[0] for name in COMPARED_METHODS if (found := misfits(name, recipe, facts))}
    return [name for name in COMPARED_METHODS if name not in reasons], reasons
