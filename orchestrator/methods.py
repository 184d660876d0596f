"""The methods that a comparison knows: each one is a recipe derived from the one that is given.

All are brought to the same number of parameters, that of the target shape, embeddings and all included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.recipe import COMPARED_METHODS, Recipe, ScratchConfig
from orchestrator.source_model import SourceFacts, result_parameters
from orchestrator.workspace import workspace_uri
from shearing.errors import UserError
from shearing.models.family import shape_of
from shearing.models.parameters import adapter_sizes, count_parameters
from shearing.pruning.config import Method as PruningMethod
from shearing.pruning.config import PruningTarget
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import check_slicing, sliced_parameters
from shearing.pruning.sparsity.config import SparsityConfig, SparsityMethod
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


def _sliced(rotation: Literal["per_signal", "shared"]) -> Callable[[Recipe, Any], Sections]:
    def sections(recipe: Recipe, source_config: Any) -> Sections:
        asked = (recipe.slicing or SlicingConfig()).model_copy(update={"rotation": rotation})
        most = compared_parameters(recipe, source_config)
        return {"pruning": None, "slicing": largest_slicing(asked, source_config, most)}

    return sections


def largest_slicing(asked: SlicingConfig, source_config: Any, parameters: int) -> SlicingConfig:
    """The slicing that keeps as many dimensions of each signal as leave at most so many parameters.

    All else is as asked. Dimensions are counted one by one, not in eights, so that the counts come close.

    Raises:
        UserError: No size leaves so few: residual matrices, and a head that stays whole, take their part.
    """
    for size in range(shape_of(source_config).hidden_size, 0, -1):
        found = asked.model_copy(update={"fraction": None, "schedule": None, "hidden_size": size})
        if not check_slicing(source_config, found) and sliced_parameters(source_config, found) <= parameters:
            return found
    raise UserError(
        f"slicing cannot leave {parameters:,} parameters or fewer of this source model: residual matrices, and an LM "
        "head that is not sliced, take more. Set slicing.head=true, or a larger pruning.target."
    )


def _two_of_four(method: SparsityMethod) -> Callable[[Recipe, Any], Sections]:
    def sections(recipe: Recipe, _source_config: Any) -> Sections:
        asked = recipe.sparsifying or SparsityConfig()
        changed = asked.model_copy(update={"pattern": "2:4", "fraction": None, "method": method})
        return {"pruning": None, "slicing": None, "sparsifying": changed}

    return sections


UNSCORED_ZEROS = ("scores", "report")  # a run's report speaks of shapes, which zeros do not change

METHODS = {
    "learned": ComparedMethod("learned shearing", "pruned", "model", _chosen_by("learned")),
    "cofi": ComparedMethod("CoFi", "pruned", "model", _cofi),
    "magnitude": ComparedMethod("magnitude", "pruned", "model", _chosen_by("magnitude")),
    "activation": ComparedMethod("activation", "pruned", "model", _chosen_by("activation")),
    "block_influence": ComparedMethod("block influence", "pruned", "model", _chosen_by("block_influence")),
    "random": ComparedMethod("random", "pruned", "model", _chosen_by("random")),
    "slicegpt": ComparedMethod("SliceGPT", "sliced", "model", _sliced("per_signal")),
    "slicegpt_shared": ComparedMethod("SliceGPT, one rotation", "sliced", "model", _sliced("shared")),
    "sparsegpt_2_4": ComparedMethod("SparseGPT 2:4", "sparse", "model", _two_of_four("sparsegpt"), UNSCORED_ZEROS),
    "magnitude_2_4": ComparedMethod("magnitude 2:4", "sparse", "model", _two_of_four("magnitude"), UNSCORED_ZEROS),
    "scratch": ComparedMethod("from scratch", None, "scratch", _scratch, left_out=("scores", "recovery")),
}


def method_recipe(name: str, recipe: Recipe, source_config: Any) -> Recipe:
    """The recipe of one method before its source is known: corpus, workspace and source are the comparison's own."""
    workers = recipe.comparison.workers if recipe.comparison is not None else None
    engine = recipe.engine if workers is None else recipe.engine.model_copy(update={"workers": workers})
    changed = {"name": f"{recipe.name}-{name}", "engine": engine, "scratch": None, "comparison": None}
    others = {"slicing": None, "sparsifying": None}
    return recipe.model_copy(update=changed | others | METHODS[name].sections(recipe, source_config))


def planned_parameters(derived: Recipe, source_config: Any) -> tuple[int, int]:
    """Parameters of a method's result at most, and how many of them are not 0, from the source model's config."""
    parameters = result_parameters(derived, source_config)
    if derived.sparsifying is None:
        return parameters, parameters
    tables = adapter_sizes(source_config, ("attention", "mlp"))
    return parameters, parameters - round(derived.sparsifying.dropped * sum(rows * columns for rows, columns in tables))


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
    try:
        derived = method_recipe(name, recipe, facts.config)
    except UserError as error:
        return error.problems
    if derived.pruning is not None:
        return check_pruning(facts.family, facts.shape, derived.pruning, source_config=facts.config)
    lora = derived.recovery.lora if derived.recovery is not None else None
    if derived.sparsifying is not None and lora is not None:
        return ["recovery.lora is given, and adapters that are added to weights would fill the zeros."]
    return []


def chosen_methods(recipe: Recipe, facts: SourceFacts) -> tuple[list[str], dict[str, str]]:
    """The methods that a comparison runs, and why others are left out.

    Methods that the recipe names are kept whether they fit or not: what is wrong with them is a problem to mend.
    """
    named = recipe.comparison.methods if recipe.comparison is not None else None
    if named is not None:
        return [name for name in COMPARED_METHODS if name in named], {}
    reasons = {name: found[0] for name in COMPARED_METHODS if (found := misfits(name, recipe, facts))}
    return [name for name in COMPARED_METHODS if name not in reasons], reasons
