"""What a recipe names by its path: whether the run itself would replace it, and whether it is what it was."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from orchestrator.recipe import Recipe
from shearing.data.installed_text import is_installed_text
from shearing.data.rule_by_path import find_module
from shearing.patience import StorageError
from shearing.storage import Store, open_store

# Folders of a workspace that runs and comparisons write, and replace when they write them again.
WRITTEN_FOLDERS = (
    "checkpoints", "chosen", "comparison", "forecast", "measures", "methods", "metrics", "mixture", "model", "pruned",
    "report", "rotated", "scratch", "sliced", "slicing", "source-shape", "sparse", "sparsifying", "stages", "tracking",
)  # fmt: skip

END_BYTES = 2**20  # of a weight file, at either end: its header, and tensors that any further training changes


def replaced_inputs(recipe: Recipe, workspace: Store) -> list[str]:
    """One problem for everything that a recipe names and that lies where the run writes.

    `source` of the workspace is written only where the run trains its source model.
    """
    trained = ("source",) if recipe.source.train is not None else ()
    written = {_place(workspace.child(name)): workspace.child(name).uri for name in (*WRITTEN_FOLDERS, *trained)}
    problems = []
    for key, named in _named(recipe):
        try:
            filesystem, path = _place(open_store(named))
        except (ValueError, OSError):  # that it cannot be opened is said where it is read
            continue
        for (other, folder), uri in written.items():
            if filesystem == other and PurePosixPath(path).is_relative_to(folder):
                problems.append(
                    f"{key} = {named!r} lies in {uri}, a folder that this run writes: what is there would be replaced "
                    "and lost. Set workspace to another folder, or move it elsewhere and name that place."
                )
    return problems


def _place(store: Store) -> tuple[str, str]:
    """A filesystem's type and a path on it, the same by whichever link it is reached."""
    return store.filesystem.type_name, os.path.realpath(store.path) if store.is_local else store.path


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and path or URI of everything that a recipe names."""
    distillation = recipe.recovery.distillation if recipe.recovery is not None else None
    text = recipe.comparison.text if recipe.comparison is not None else None
    tasks = recipe.comparison.tasks if recipe.comparison is not None else None
    single = {
        "source.model": recipe.source.model,
        "recovery.distillation.teacher": None if distillation is None else distillation.teacher,
        "references.file": recipe.references.file,
        "comparison.text.file": None if text is None else text.file,
        "comparison.tasks.files": None if tasks is None else tasks.files,
        "corpus.path": recipe.corpus.path,
    }
    yield from ((key, path) for key, path in single.items() if path is not None)
    for name, domain in recipe.corpus.domains.items():
        texts = [domain.text] if isinstance(domain.text, str) else domain.text
        yield from ((f"corpus.domains.{name}.text", text) for text in texts if not is_installed_text(text))


def named_files(recipe: Recipe) -> dict[str, str]:
    """Key -> file, for every key that names one file whose text shapes what comes out."""
    text = recipe.comparison.text if recipe.comparison is not None else None
    files = {"references.file": recipe.references.file, "comparison.text.file": None if text is None else text.file}
    if recipe.mixture.is_path:
        module = find_module(recipe.mixture.rule.partition(":")[0])
        files["mixture.rule"] = module.origin if module is not None else None
    return {key: file for key, file in files.items() if file is not None}


def model_contents(folder: Store) -> dict[str, str]:
    """Name -> digest of every JSON file of a model directory, and of both ends of every weight file."""
    return {
        name: file_digest(folder.child(name).uri, END_BYTES if name.endswith(".safetensors") else None)
        for name in folder.list()
        if name.endswith((".safetensors", ".json"))
    }


def file_digest(uri: str, end_bytes: int | None = None) -> str:
    """16 hex digits of a file, or of its size and ends; `absent` where there is none."""

    def digest(stream: BinaryIO) -> str:
        found, size = hashlib.sha256(), stream.seek(0, os.SEEK_END)
        found.update(str(size).encode())
        stream.seek(0)
        found.update(stream.read(end_bytes or size))
        if end_bytes is not None:
            stream.seek(max(0, size - end_bytes))
            found.update(stream.read(end_bytes))
        return found.hexdigest()[:16]

    try:
        return open_store(uri).read_with("", digest)
    except StorageError:  # away, which is not absent: a stage would be taken for one of other inputs
        raise
    except (OSError, ValueError):
        return "absent"
