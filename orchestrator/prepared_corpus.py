"""Finds the prepared corpus of a recipe without preparing anything."""

from orchestrator.recipe import Recipe
from orchestrator.workspace import open_workspace
from shearing.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from shearing.errors import UserError
from shearing.storage import Store, open_store


def find_prepared_corpus(recipe: Recipe, recipe_path: str) -> tuple[Store, Manifest]:
    """The corpus that the recipe's run has used, or the only one under `corpus.path` with its domains and length.

    Args:
        recipe: Whose corpus is meant.
        recipe_path: Its file, for the error.

    Raises:
        UserError: There is none, or several fit.
    """
    mark = open_workspace(recipe).mark("corpus")
    if mark is not None and mark.finished and open_store(mark.outputs["path"]).exists(MANIFEST_NAME):
        store = open_store(mark.outputs["path"])
        manifest = load_manifest(store)
        if _fits(recipe, manifest):  # an override may ask for another than the run's
            return store, manifest
    folder = open_store(recipe.corpus.path)
    prepared = [folder.child(name) for name in folder.list() if folder.exists(f"{name}/{MANIFEST_NAME}")]
    manifests = [(store, load_manifest(store)) for store in prepared]
    fitting = [(store, manifest) for store, manifest in manifests if _fits(recipe, manifest)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(store.uri for store, _ in fitting)
        raise UserError(
            f"several prepared corpora fit this recipe: {names}; run `python pipelines/shear.py {recipe_path}` once, "
            "or remove those that are not meant"
        )
    others = f"; {len(prepared)} other corpora lie there" if prepared else ""
    raise UserError(
        f"corpus.path = {recipe.corpus.path!r} holds no prepared corpus of this recipe's domains in sequences of "
        f"{recipe.corpus.sequence_tokens} tokens{others}. Run `python pipelines/prepare_corpus.py {recipe_path}` first."
    )


def _fits(recipe: Recipe, manifest: Manifest) -> bool:
    same_domains = set(manifest.domains) == set(recipe.corpus.domains)
    return same_domains and manifest.sequence_tokens == recipe.corpus.sequence_tokens
