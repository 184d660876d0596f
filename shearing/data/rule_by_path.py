"""A mixture rule of the user's own, named by its path `package.module:function`.

It is imported where it runs, in the actor that decides the proportions; before that its source is only read.
"""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from shearing.errors import UserError

WHERE = (
    "It has to be importable on the cluster as well: installed on every node, or below the folder that the command is "
    "started from (`ray job submit --working-dir .` sends that folder along)"
)


def import_rule(path: str) -> Callable[..., Any]:
    """The function. This runs the user's module. Raises UserError where there is none."""
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:  # as Ray does in its workers, so that driver and cluster find the same modules
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"mixture.rule = {path}: module {module_name} cannot be imported ({type(error).__name__}: {error}). "
            f"{WHERE}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        held = "is no function" if hasattr(module, function_name) else "does not exist"
        raise UserError(f"mixture.rule = {path}: {function_name} {held} in {module.__file__}. Name a function of it.")
    return function


def rule_problem(path: str) -> str | None:
    """What is wrong with a rule's path as far as it shows without running the user's code; None if nothing does."""
    module_name, _, function_name = path.partition(":")
    spec = find_module(module_name)
    if spec is None:
        return (
            f"mixture.rule = {path}: there is no module {module_name} (looked from {os.getcwd()} and among what is "
            f"installed). {WHERE}."
        )
    source = Path(spec.origin) if spec.origin else None
    if source is None or source.suffix != ".py" or not source.is_file():
        return None
    try:
        names = set(_names(ast.parse(source.read_text(encoding="utf-8")).body))
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"mixture.rule = {path}: {source} is not Python ({error})."
    if function_name in names or "*" in names:
        return None
    defined = ", ".join(sorted(name for name in names if not name.startswith("_"))) or "nothing"
    return f"mixture.rule = {path}: {source} has no {function_name}; it defines: {defined}. Name a function of it."


def find_module(name: str) -> ModuleSpec | None:
    """A module's spec. Its parents are looked into and not imported, since importing them would run them."""
    parts = name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0]) or PathFinder.find_spec(parts[0], [os.getcwd()])
    except ValueError:  # a module without a spec, such as __main__
        return None
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:depth]), list(spec.submodule_search_locations))
    return spec


def _names(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that a module's statements bind, those within `if` and `try` too."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _names(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from _names(handler.body)
