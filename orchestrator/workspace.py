"""The folder of one run: its layout, the marks of its stages, and the lock that keeps a second driver out.

recipe.yaml                 the recipe as resolved
stages.json                 names of the stages that the run goes through, in order
stages/<stage>.json         mark: begun or finished, what it rests on, what was installed, what it put out
metrics/<phase>.jsonl       mixture/<phase>/NNNNNN.json       checkpoints/<phase>/
source/  pruned/  scratch/  model/                            Hugging Face directories
report/index.html  report/report.json  report/report.md
measures/tasks/<model>.json                                   of a comparison: kept as they are made
"""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable
from typing import Any

from pydantic import Field

from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import dump_recipe
from shearing.config import Config
from shearing.storage import Store, open_store

RECORDED_PACKAGES = (
    "ray", "torch", "transformers", "deepspeed", "tokenizers", "pyarrow", "numpy", "safetensors", "pydantic",
)  # fmt: skip


class Mark(Config):
    """What is known of one stage of a run. Times are Unix seconds.

    `rests_on` holds what went into the stage: `recipe` (key path -> value), `stages` (earlier stage -> fingerprint)
    and, where the recipe names files that are read whole, `files` (key path -> digest); `inputs` is its fingerprint. A
    stage that has begun and not finished has no `finished`. `versions` is of what was installed when it last began.
    """

    stage: str
    inputs: str
    rests_on: dict[str, dict[str, Any]]
    started: float
    finished: float | None = None
    seconds: float | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    outputs: dict[str, Any] = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What later stages rest on: of the content where the stage reports one, else of its inputs."""
        return str(self.outputs.get("fingerprint", self.inputs))


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Workspace:
    """One run's folder on any filesystem. Every file is written whole or not at all."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def hasty(self) -> "Workspace":
        """The same one, for what is not worth waiting for."""
        return Workspace(self.store.hasty())

    def mark(self, stage: str) -> Mark | None:
        """The mark of a stage, or None where it never began."""
        name = f"stages/{stage}.json"
        return Mark.model_validate(self.store.read_json(name)) if self.store.exists(name) else None

    def begin(self, stage: str, rests_on: dict[str, dict[str, Any]]) -> Mark:
        """Write that a stage begins; a stage begun earlier on the same inputs keeps its first start."""
        inputs, now_s = fingerprint(rests_on), time.time()
        mark = Mark(stage=stage, inputs=inputs, rests_on=rests_on, started=now_s, versions=versions())
        earlier = self.mark(stage)
        if earlier is not None and earlier.inputs == mark.inputs:
            mark = mark.model_copy(update={"started": earlier.started, "seconds": earlier.seconds})
        self._write(mark)
        return mark

    def finish(self, mark: Mark, outputs: dict[str, Any], seconds: float) -> Mark:
        """Write that a stage is done. `seconds` is the time that this run spent in it."""
        done = mark.model_copy(
            update={"finished": time.time(), "seconds": (mark.seconds or 0.0) + seconds, "outputs": outputs}
        )
        self._write(done)
        return done

    def interrupted(self, mark: Mark, seconds: float) -> None:
        """Keep the time that an attempt took so far, so that the stage's seconds count all attempts."""
        self._write(mark.model_copy(update={"seconds": (mark.seconds or 0.0) + seconds}))

    def marks(self) -> dict[str, Mark]:
        """Every mark that is there."""
        names = [name.removesuffix(".json") for name in self.store.list("stages") if name.endswith(".json")]
        return {name: mark for name in names if (mark := self.mark(name)) is not None}

    def record(self, recipe: Recipe, stages: Iterable[str]) -> None:
        """Write the resolved recipe and the names of the stages that it goes through."""
        self.store.write_bytes("recipe.yaml", dump_recipe(recipe).encode())
        self.store.write_json("stages.json", list(stages))

    def _write(self, mark: Mark) -> None:
        self.store.write_json(f"stages/{mark.stage}.json", mark.model_dump(mode="json"))


def workspace_uri(recipe: Recipe) -> str:
    """Where a recipe's run lies: what the recipe says, or runs/<name>."""
    return recipe.workspace or f"runs/{recipe.name}"


def open_workspace(recipe: Recipe) -> Workspace:
    """The workspace of a recipe; it need not exist yet. Raises ValueError for a URI that nothing opens."""
    return Workspace(open_store(workspace_uri(recipe)))


def versions() -> dict[str, str]:
    """Installed versions of what shapes results, without importing any of it."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
