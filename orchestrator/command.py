"""The main job as a command: recipe in, exit status out, nothing but plain words for what the user can mend."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

from orchestrator.console import Console, format_duration
from orchestrator.failures import storage_failure
from orchestrator.head_watch import HeadLostError
from orchestrator.plan import plan
from orchestrator.plan_text import render_plan
from orchestrator.preflight import preflight
from orchestrator.ray_session import JOB_VARIABLE, RaySession
from orchestrator.recipe import MethodSection, Recipe
from orchestrator.recipe_loading import load_recipe
from orchestrator.run import run_recipe
from orchestrator.stage import Context
from orchestrator.stages import smaller_folder
from shearing.errors import UserError

CHECK_STORAGE = "Check the storage, its address, the credentials that this process has for it, and the network."
DONE, FAILED, TO_MEND = 0, 1, 2
# Sections that a recipe cannot do without, by the method that a command runs.
NEEDED: dict[MethodSection, tuple[str, ...]] = {"pruning": ("pruning", "recovery"), "slicing": ()}


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    recipe: str
    overrides: list[str]
    plan: bool = False
    verbose: bool = False
    dashboard: bool = False
    method: MethodSection = "pruning"


def parse(arguments: list[str], method: MethodSection, description: str, default: Path) -> Command:
    """What a command line asks for: a recipe (or the default one), overrides, and how much to show."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe (default: the quickstart), then overrides"
    )
    parser.add_argument("--plan", action="store_true", help="show what would run and what is missing; start nothing")
    parser.add_argument("--verbose", action="store_true", help="let Ray's and DeepSpeed's own output through")
    parser.add_argument("--dashboard", action="store_true", help="serve Ray's dashboard where Ray is embedded")
    found = parser.parse_intermixed_args(arguments)
    recipes = [word for word in found.words if "=" not in word]
    if len(recipes) > 1:
        parser.error(f"one recipe at a time; given: {', '.join(recipes)}. Overrides are written key=value.")
    overrides = [word for word in found.words if "=" in word]
    recipe = recipes[0] if recipes else str(default)
    return Command(recipe, overrides, found.plan, found.verbose, found.dashboard, method)


Job = Callable[[Command, Console, TextIO], int]


def run_command(command: Command, out: TextIO, err: TextIO, job: Job | None = None) -> int:
    """Do what was asked: one run of the recipe, or another `job`.

    Status: 0 done, 2 what the user can mend, 1 other failures, 128 + signal if stopped."""
    console = Console(err, command.verbose)
    signals: list[int] = []
    try:
        with _stop_on_signals(signals), console.warnings_of_packages():
            return (job or _run)(command, console, out)
    except UserError as error:
        _list_problems(error.problems, console)
        return TO_MEND
    except (KeyboardInterrupt, SystemExit) as stop:  # Ray may answer either by one of its own; while it starts, always
        number = signals[0] if signals else int(signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT)
        console.close()
        console.text(
            f"stopped by {signal.Signals(number).name}. What was finished is kept; to go on, run the same again:"
        )
        console.text(f"  {_again()}")
        return 128 + number
    except HeadLostError as error:
        return _fail(str(error), console)
    except Exception as error:  # the one place where any failure becomes an exit status
        if failure := storage_failure(error):
            return _fail(f"{failure}\n{CHECK_STORAGE}", console)
        return _fail("".join(traceback.format_exception(error)).rstrip(), console)


def _run(command: Command, console: Console, out: TextIO) -> int:
    started = time.monotonic()
    recipe = load_recipe(command.recipe, command.overrides, needs=NEEDED[command.method]).only(command.method)
    if command.plan:
        found = plan(recipe)
        out.write(render_plan(found))
        return TO_MEND if found.problems else DONE
    if problems := preflight(recipe):
        raise UserError(problems)
    console.note(f"recipe {recipe.name} checked in {format_duration(time.monotonic() - started)}")
    session = RaySession(recipe, command.verbose, command.dashboard, on_lost=partial(end_without_ray, console))
    context = run_recipe(recipe, console, session)
    _say_where(recipe, context, time.monotonic() - started, out)
    return DONE


def _say_where(recipe: Recipe, context: Context, seconds: float, out: TextIO) -> None:
    store = context.workspace.store
    out.write(f"{recipe.name}: done in {format_duration(seconds)}\n")
    out.write(f"  report  {store.child('report/index.html').uri}\n")
    result = "model" if recipe.recovery is not None else smaller_folder(recipe)
    out.write(f"  model   {store.child(result).uri}\n")


def _list_problems(problems: list[str], console: Console) -> None:
    console.close()
    console.text(f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'} to mend:")
    for problem in problems:
        console.text("  - " + problem.replace("\n", "\n    "))


def _fail(why: str, console: Console) -> int:
    console.close()
    console.text(why)
    console.text(f"failed. What was finished is kept; to go on from there, run the same again:\n  {_again()}")
    return FAILED


def end_without_ray(console: Console, why: str) -> None:
    """End the process: without its head, Ray never returns from what the main thread waits for."""
    os._exit(_fail(why, console))


def _again() -> str:
    if os.environ.get(JOB_VARIABLE):
        return "ray job submit --working-dir . -- python " + shlex.join(sys.argv)
    return "python " + shlex.join(sys.argv)


@contextlib.contextmanager
def _stop_on_signals(seen: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM as KeyboardInterrupt in the main thread, noted in `seen`; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
