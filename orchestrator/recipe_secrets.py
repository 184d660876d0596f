"""Keeps secrets out of recipes: a recipe is kept in the workspace, and its paths are shown in metrics and reports."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from orchestrator.recipe import Recipe

SECRET_WORDS = ("secret", "token", "password", "signature", "credential", "access_key", "accesskey")
SECRET_NAMES = ("sig", "key", "apikey", "api_key")


def secret_problems(recipe: Recipe) -> list[str]:
    """Every place of a recipe whose URI holds a password, a signature or the like; the secret itself is not told."""
    return [
        f"{key} holds {what} in its URI, and a recipe is kept in the workspace. Take it out, and let storage be opened "
        "by a role of the machine or by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        for key, text in _texts(recipe.model_dump(mode="json"))
        if (what := _secret_in(text))
    ]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested values, with the key that leads to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def _secret_in(text: str) -> str:
    """What secret a URI holds, in words; empty where it holds none or is no URI."""
    if "://" not in text:
        return ""
    parts = urlsplit(text)
    if parts.password is not None:
        return "a user name with a password"
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name.lower() in SECRET_NAMES or any(word in name.lower().replace("-", "_") for word in SECRET_WORDS):
            return f"a parameter {name!r}"
    return ""
