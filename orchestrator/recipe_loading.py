"""From a YAML file and overrides to a validated recipe, with every problem named at once."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.recipe import Recipe
from orchestrator.recipe_schema import annotation_at, describe_allowed, describe_meaning, did_you_mean, mapping_value
from orchestrator.recipe_secrets import secret_problems
from orchestrator.yaml_reading import read_yaml, write_yaml
from shearing.errors import UserError


def load_recipe(path: str, overrides: list[str], needs: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides `section.key=value` (values in YAML) laid over it.

    An override `corpus.domains.<name>=null` takes that domain out. Sections that `needs` names have to be there.
    Raises UserError with every unknown, missing and wrong key.
    """
    raw = read_yaml(_read_text(path), path)
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of sections such as corpus and pruning; given: {type(raw).__name__}"
        )
    problems = [problem for override in overrides if (problem := _apply_override(raw, override))]
    try:
        problems += [_missing(section) for section in needs if raw.get(section) is None]
        recipe = recipe_from(raw)
    except UserError as error:
        raise UserError(problems + error.problems) from None
    if problems:
        raise UserError(problems)
    return recipe


def recipe_from(raw: dict[str, Any]) -> Recipe:
    """The recipe that plain values describe. Raises UserError with every problem."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(_problems_of(error)) from None
    recipe = _with_root(recipe)
    if problems := secret_problems(recipe):
        raise UserError(problems)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults written out."""
    return write_yaml(recipe.model_dump(mode="json"))


def _read_text(path: str) -> str:
    file = Path(path)
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    siblings = sorted(entry.name for entry in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, siblings, n=1, cutoff=0.5)
    hint = f" Did you mean {file.parent / close[0]}?" if close else ""
    raise UserError(f"no recipe {path!r}: there is no such file (looked from {os.getcwd()}).{hint}")


def _apply_override(raw: dict[str, Any], override: str) -> str | None:  # noqa: PLR0911 - one return a problem
    """Lay one override over the raw recipe; the problem, where it has one."""
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path):
        return f"override {override!r}: write section.key=value, for example pruning.steps=100"
    if annotation_at(path)[2] < len(path):
        return f"override {override!r}: unknown key {key.strip()}; {did_you_mean(path)}"
    try:
        value = read_yaml(text, f"override {override!r}")
    except UserError as error:
        return str(error)
    section: Any = raw
    for depth, part in enumerate(path[:-1]):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            return f"override {override!r}: {'.'.join(path[: depth + 1])} is {section!r} in the recipe, not a section"
    in_mapping = mapping_value(annotation_at(path[:-1])[0]) is not None if len(path) > 1 else False
    if value is None and in_mapping:
        if section.pop(path[-1], None) is None:
            return f"override {override!r}: there is no {path[-1]}; there are: {', '.join(map(str, section))}"
        return None
    section[path[-1]] = value
    return None


def _problems_of(error: ValidationError) -> list[str]:
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path = [str(part) for part in detail["loc"]]
        known = len(path) if detail["type"] == "extra_forbidden" else annotation_at(path)[2]
        key = ".".join(path[:known])
        problems.setdefault(key, _problem(detail, key, whole=known == len(path)))
    return list(problems.values())


def _problem(detail: ErrorDetails, key: str, *, whole: bool) -> str:
    """One problem in words; `whole` where the key is the place itself, not something inside its value."""
    path = key.split(".") if key else []
    if detail["type"] == "extra_forbidden":
        return f"{key} is not a key of a recipe; {did_you_mean(path)}"
    if detail["type"] == "missing" and whole:
        return _missing(key)
    given = repr(detail["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    if detail["type"] == "value_error":
        return f"{key} = {given}: {detail['msg'].removeprefix('Value error, ')}" if key else detail["msg"]
    return f"{key} = {given} is not allowed; allowed: {describe_allowed(path)}"


def _missing(key: str) -> str:
    path = key.split(".")
    meaning = describe_meaning(path)
    return f"{key} is missing; allowed: {describe_allowed(path)}.{f' {meaning}.' if meaning else ''} Set {key}=..."


def _with_root(recipe: Recipe) -> Recipe:
    """Relative text paths joined to `corpus.root`, so that everything after loading sees whole paths."""
    root = recipe.corpus.root
    if root is None:
        return recipe
    domains = {}
    for name, domain in recipe.corpus.domains.items():
        texts = [domain.text] if isinstance(domain.text, str) else domain.text
        joined = [_join(root, text) for text in texts]
        domains[name] = domain.model_copy(update={"text": joined[0] if isinstance(domain.text, str) else joined})
    return recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"root": None, "domains": domains})})


def _join(root: str, text: str) -> str:
    if os.path.isabs(text) or text.startswith("~") or urlsplit(text).scheme:
        return text
    return f"{root.rstrip('/')}/{text}"
