"""Runs a comparison: corpus and source once, then every method as a run of its own, as many at once as there is room.

A method's run is driven from a Ray task without a CPU of its own, in the same cluster, so that it ends with the
comparison however that ends, is started again where its process dies, and needs no second driver on this machine.
"""

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from orchestrator.cluster_fit import comparison_demands
from orchestrator.console import Console, format_duration
from orchestrator.methods import METHODS, chosen_methods, compared_parameters, method_recipe, on_source
from orchestrator.ray_session import CPU_FOR_DATA, RaySession, SurroundingSession
from orchestrator.recipe import Recipe
from orchestrator.run import run_recipe, stages_of
from orchestrator.source_model import inspect_source
from orchestrator.stage import Context, Stage, finished_context
from orchestrator.workspace import Workspace, fingerprint, open_workspace
from shearing.errors import UserError
from shearing.storage import Store, open_store

POLL_S = 2.0
DRIVER_RETRIES = 2


@dataclass(frozen=True)
class MethodRun:
    """One method's run: its recipe, and the stages that it goes through."""

    name: str
    recipe: Recipe

    @property
    def stages(self) -> list[Stage]:
        """In order."""
        return [stage for stage in stages_of(self.recipe) if stage.name not in METHODS[self.name].left_out]

    @property
    def workspace(self) -> Workspace:
        """Its folder."""
        return open_workspace(self.recipe)

    def finished(self, console: Console) -> Context | None:
        """The outputs of all stages where nothing is left to do, else None."""
        session = SurroundingSession(self.recipe)
        return finished_context(self.stages, Context(self.recipe, self.workspace, console, session))


def runs_at_once(recipe: Recipe, cpus: float | None, gpus: float | None = None) -> int:
    """Methods that run beside each other: at least one, at most what CPUs and GPUs hold, or what the recipe says.

    Every run is given its workers' CPUs and those of reading, which asks Ray for none and uses them all the same.

    Args:
        recipe: The comparison's.
        cpus: Of the cluster that is joined; None where Ray is embedded and declares what is asked for, so that the
            machine's own cores count.
        gpus: Of the cluster, embedded or joined; None where it is not known yet.
    """
    assert recipe.comparison is not None
    engine, asked = recipe.engine, recipe.comparison.at_once
    workers = recipe.comparison.workers or engine.most_workers
    if cpus is not None:
        possible = cpus / (workers * engine.cpus_per_worker + CPU_FOR_DATA)
    elif asked is not None:
        possible = float(asked)
    else:
        possible = (os.cpu_count() or 1) / (workers * engine.cpus_per_worker)
    if engine.gpus_per_worker and gpus is not None:
        possible = min(possible, gpus / (workers * engine.gpus_per_worker))
    at_most = max(1, math.floor(possible + 1e-9))
    return at_most if asked is None else min(asked, at_most)


def method_runs(context: Context) -> list[MethodRun]:
    """The runs of a comparison whose source model is there."""
    recipe, facts = context.recipe, inspect_source(context.recipe.only("pruning"))
    names, _ = chosen_methods(recipe, facts)
    source, references = context.outputs["source"]["model"], context.outputs["references"]["losses"]
    base = context.workspace.store.uri
    return [
        MethodRun(name, on_source(name, method_recipe(name, recipe, facts.config), base, source, references))
        for name in names
    ]


def run_methods(context: Context) -> dict[str, Any]:
    """Bring every method's run to its end; one that fails does not stop the others. What failed is tried again."""
    runs = method_runs(context)
    done = {run.name: found for run in runs if (found := run.finished(context.console))}
    for name in done:
        context.console.note(f"{name}: finished already")
    failed = _drive_all([run for run in runs if run.name not in done], context)
    prints = {}
    for run in runs:
        if run.name not in failed:
            found = done.get(run.name) or run.finished(context.console)
            assert found is not None, "a driver that came back without a problem has finished every stage"
            prints[run.name] = found.fingerprints
    folders = {run.name: run.workspace.store.uri for run in runs if run.name not in failed}
    facts = inspect_source(context.recipe.only("pruning"))
    return {
        "runs": folders,
        "failed": failed,
        "parameters": compared_parameters(context.recipe, facts.config),
        "fingerprint": fingerprint(prints),
    }


def methods_are_whole(_context: Context, outputs: dict[str, Any]) -> bool:
    """Whether all methods are there and none has failed."""
    folders = {name: open_store(uri) for name, uri in outputs["runs"].items()}
    return not outputs["failed"] and all(
        store.exists(f"{METHODS[name].after}/config.json") for name, store in folders.items()
    )


def _drive_all(runs: list[MethodRun], context: Context) -> dict[str, list[str]]:
    """Drive runs, several at once. Returns the problems of those that failed."""
    import ray

    if not runs:
        return {}
    there = ray.cluster_resources()
    cpus = None if context.session.is_embedded else there.get("CPU", 0.0)
    at_once = min(len(runs), runs_at_once(context.recipe, cpus, there.get("GPU", 0.0)))
    context.console.note(f"{len(runs)} methods, {at_once} at a time; what each one says is in its console.log")
    task = ray.remote(num_cpus=0, max_retries=DRIVER_RETRIES)(drive)
    waiting, failed = list(runs), {}
    running: dict[Any, _Followed] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                run = waiting.pop(0)
                running[task.remote(run, context.session.verbose)] = _Followed(run, context.console)
            ready, _ = ray.wait(list(running), timeout=POLL_S)
            for followed in running.values():
                followed.tell()
            for reference in ready:
                followed = running.pop(reference)
                if problems := _problems_of(reference):
                    failed[followed.run.name] = problems
                    for problem in problems:
                        context.console.warn(f"{followed.run.name}: {problem}")
                else:
                    context.console.note(f"{followed.run.name}: done in {format_duration(followed.seconds)}")
    except KeyboardInterrupt:
        _let_them_leave(list(running), context.console)
        raise
    return failed


def _let_them_leave(drivers: list[Any], console: Console) -> None:
    """Stop drivers as Ctrl-C stops a run of its own, so that each has a while to save a checkpoint."""
    import ray

    from actors.training import LEAVE_WITHIN_S

    if drivers:
        console.note("every method saves a checkpoint first; ask again to stop at once")
        for driver in drivers:
            ray.cancel(driver, recursive=False)  # a KeyboardInterrupt in it; its own actors and tasks it ends itself
        ray.wait(drivers, num_returns=len(drivers), timeout=LEAVE_WITHIN_S)


def _problems_of(reference: Any) -> list[str]:
    import ray

    try:
        problems: list[str] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return [f"its driver died: {str(error).strip().splitlines()[0]}"]
    return problems


def drive(run: MethodRun, verbose: bool) -> list[str]:
    """Bring one method's run to its end, in a Ray task. Returns what went wrong; nothing where all is done."""
    with _console_log(run.workspace.store) as stream:
        console = Console(stream, verbose)
        try:
            run_recipe(run.recipe, console, SurroundingSession(run.recipe, verbose), run.stages)
        except UserError as error:
            return error.problems
        except Exception as error:  # whatever it is, the other methods go on; the log has all of it
            console.text(traceback.format_exc())
            where = run.workspace.store.child("console.log").uri
            return [f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''} (see {where})"]
    return []


@contextlib.contextmanager
def _console_log(store: Store) -> Iterator[TextIO]:
    """What a run says, kept beside it: as it goes on a local disk, whole at the end elsewhere."""
    import io

    if store.is_local:
        os.makedirs(store.path, exist_ok=True)
        with open(store.locate("console.log"), "a", encoding="utf-8", buffering=1) as file:
            yield file
        return
    kept = io.StringIO()
    try:
        yield kept
    finally:
        store.write_bytes("console.log", kept.getvalue().encode())


class _Followed:
    """A run that goes on elsewhere, told of by its marks."""

    def __init__(self, run: MethodRun, console: Console) -> None:
        self.run, self.console = run, console
        self.started = time.monotonic()
        self.told: set[tuple[str, bool]] = set()
        for name, mark in run.workspace.marks().items():
            self.told |= {(name, False), (name, mark.finished is not None)}

    @property
    def seconds(self) -> float:
        """Since it was handed to its driver."""
        return time.monotonic() - self.started

    def tell(self) -> None:
        """Say which stages began and ended since the last time; those of under a second only that they ended."""
        for name, mark in self.run.workspace.marks().items():
            state = (name, mark.finished is not None)
            if state in self.told:
                continue
            self.told.add(state)
            if mark.finished is None:
                self.console.note(f"{self.run.name}: {name} begins")
            elif (mark.seconds or 0) >= 1:
                self.console.note(f"{self.run.name}: {name} took {format_duration(mark.seconds or 0)}")


def comparison_session(recipe: Recipe, verbose: bool, dashboard: bool, on_lost: Callable[[str], None]) -> RaySession:
    """Ray for all methods together: embedded, with CPUs declared for as many runs as go on at once."""
    at_once = runs_at_once(recipe, None)
    return RaySession(recipe, verbose, dashboard, runs_at_once=at_once, demands=comparison_demands, on_lost=on_lost)
