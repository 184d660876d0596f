"""One stage of a run: what it rests on, what it does, and when it is done."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from orchestrator.console import Console, format_duration
from orchestrator.named_files import file_digest, named_files
from orchestrator.recipe import Recipe
from orchestrator.workspace import Mark, Workspace, fingerprint
from shearing.data.manifest import Manifest, load_manifest
from shearing.errors import UserError
from shearing.storage import Store, open_store

if TYPE_CHECKING:
    from orchestrator.ray_session import RaySession

# Keys that may change between two runs in one workspace: they say where and how fast, not what comes out.
FREE_KEYS = (
    "corpus.path", "corpus.root", "corpus.malformed_limit", "*.checkpoint_every_steps",
    "mixture.on_exhausted", "engine.workers", "engine.workers.*",
    "engine.cpus_per_worker", "engine.gpus_per_worker", "engine.zero_stage",
    "engine.micro_batch_sequences", "engine.activation_checkpointing", "engine.max_failures", "watchdog.*", "trackers",
    "comparison.workers", "comparison.at_once", "hardware", "hardware.*",
)  # fmt: skip
KEEP_SECONDS_EVERY_S = 30.0


@dataclass
class Context:
    """What a stage is given: the recipe, the run's folder, Ray, and what earlier stages put out."""

    recipe: Recipe
    workspace: Workspace
    console: Console
    session: "RaySession"
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def corpus(self) -> tuple[Store, Manifest]:
        """The prepared corpus, once the stage `corpus` is done."""
        store = open_store(self.outputs["corpus"]["path"])
        return store, load_manifest(store)


def _always(_context: Context, _outputs: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """A stage as data.

    Args:
        name: As in marks and metrics.
        title: What it does, for a person.
        keys: The recipe's sections and keys that shape what it puts out.
        after: Earlier stages that it rests on; those a recipe leaves out do not count.
        run: Does the work and returns the outputs (JSON values).
        is_whole: Whether what a finished mark promises is still there.
        resumes: It keeps work in progress that only the same inputs may continue.
        needs_ray: Ray is started before it runs.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    after: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    is_whole: Callable[[Context, dict[str, Any]], bool] = _always
    resumes: bool = False
    needs_ray: bool = True

    def recipe_inputs(self, recipe: Recipe) -> dict[str, Any]:
        """Key path -> value of all in the recipe that shapes this stage's outputs."""
        return {key: value for key, value in flat_keys(recipe) if _under(key, self.keys) and not is_free(key)}

    def rests_on(self, context: Context) -> dict[str, dict[str, Any]]:
        """All that goes in: recipe keys, the text of files that they name, and fingerprints of earlier stages."""
        earlier = {name: context.fingerprints[name] for name in self.after if name in context.fingerprints}
        return self.given(context.recipe) | {"stages": earlier}

    def given(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """What goes in besides earlier stages; `files` only where the recipe names any."""
        files = {key: file_digest(file) for key, file in named_files(recipe).items() if _under(key, self.keys)}
        return {"recipe": self.recipe_inputs(recipe)} | ({"files": files} if files else {})


def flat_keys(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every key path of a recipe with its value; lists are values."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            yield prefix, value

    yield from walk("", recipe.model_dump(mode="json"))


def is_free(key: str) -> bool:
    """Whether a key may change between two runs in one workspace."""
    return any(fnmatch(key, pattern) for pattern in FREE_KEYS)


def changed_inputs(mark: Mark, rests_on: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between a mark and what a stage rests on now, a line each: `key: old -> new`."""
    lines = []
    for kind, label in (("recipe", ""), ("files", "content of "), ("stages", "outputs of stage ")):
        old, new = mark.rests_on.get(kind, {}), rests_on.get(kind, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"{label}{key}: {_shown(old, key)} -> {_shown(new, key)}")
    return lines


def run_stage(stage: Stage, context: Context) -> Mark:
    """Bring one stage to its end, or skip it where it is finished on the same inputs.

    Raises UserError where work in progress rests on other inputs.
    """
    rests_on = stage.rests_on(context)
    mark = context.workspace.mark(stage.name)
    if mark is not None and mark.inputs == fingerprint(rests_on):
        if mark.finished is not None and stage.is_whole(context, mark.outputs):
            when = datetime.fromtimestamp(mark.finished).strftime("%Y-%m-%d %H:%M")
            context.console.note(f"finished already ({when}, took {format_duration(mark.seconds or 0)}): skipped")
            return mark
    elif mark is not None and stage.resumes:
        raise UserError(other_inputs(stage, context.workspace, changed_inputs(mark, rests_on)))
    mark = context.workspace.begin(stage.name, rests_on)
    if stage.needs_ray:
        context.session.start(context.console)
    started = time.monotonic()
    with _seconds_kept(context.workspace, context.console, mark, started):
        outputs = stage.run(context)
    return context.workspace.finish(mark, outputs, time.monotonic() - started)


@contextlib.contextmanager
def _seconds_kept(workspace: Workspace, console: Console, mark: Mark, started: float) -> Iterator[None]:
    """Keep the time that an attempt takes, now and then while it goes on: its process may die without a word.

    Says when that begins to fail, and when it goes well again: a run that waits for its storage shows nothing else.
    """
    over, hasty = threading.Event(), workspace.hasty()

    def keep() -> None:
        failing = False
        while not over.wait(KEEP_SECONDS_EVERY_S):
            try:
                hasty.interrupted(mark, time.monotonic() - started)
            except OSError as error:
                if not failing:
                    console.warn(
                        f"the workspace cannot be written; it is tried for a while before the run ends: {error}"
                    )
                failing = True
            else:
                if failing:
                    console.note("the workspace can be written again")
                failing = False

    keeping = threading.Thread(target=keep, name="seconds-spent", daemon=True)
    keeping.start()
    try:
        try:
            yield
        finally:
            over.set()
            keeping.join()  # or it might write over what is written of the stage now
    except BaseException:
        with contextlib.suppress(OSError):  # why it ended is what has to be said
            hasty.interrupted(mark, time.monotonic() - started)
        raise


def finished_context(stages: Sequence[Stage], context: Context) -> Context | None:
    """The context with the outputs of all stages where every one of them is finished on these inputs; else None."""
    for stage in stages:
        mark = context.workspace.mark(stage.name)
        if mark is None or mark.inputs != fingerprint(stage.rests_on(context)):
            return None
        if mark.finished is None or not stage.is_whole(context, mark.outputs):
            return None
        context.outputs[stage.name] = mark.outputs
        context.fingerprints[stage.name] = mark.fingerprint
    return context


def recipe_conflicts(stages: list[Stage], recipe: Recipe, workspace: Workspace) -> list[str]:
    """One problem where work in progress in the workspace rests on other recipe keys than these; else none."""
    for stage in stages:
        mark = workspace.mark(stage.name) if stage.resumes else None
        if mark is not None:
            now = stage.given(recipe) | {"stages": mark.rests_on.get("stages", {})}
            changes = changed_inputs(mark, now)
            if changes:  # later stages rest on the same keys and more: the first says enough
                return [other_inputs(stage, workspace, changes)]
    return []


def other_inputs(stage: Stage, workspace: Workspace, changes: list[str]) -> str:
    """The problem of a workspace whose work rests on something else than what the recipe asks now."""
    listed = "".join(f"\n    {line}" for line in changes)
    return (
        f"the workspace {workspace.store.uri} belongs to a different recipe: its stage {stage.name} began with other "
        f"inputs (there -> asked now):{listed}\n    Put these back, or give this run its own folder with workspace=..."
    )


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
