"""The keys that a recipe may hold, found from its classes: which exist, what each allows, what a wrong one meant."""

import difflib
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.recipe import Recipe

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without None; the annotation itself where it is no union."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if member is not type(None)]
    return [annotation]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for member in _alternatives(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def mapping_value(annotation: Any) -> Any | None:
    """The annotation of the values where a field is a mapping with names of the user's choice, else None."""
    for member in _alternatives(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def annotation_at(path: list[str]) -> tuple[Any, FieldInfo | None, int]:
    """What stands at a key path: its annotation, its field, and how many parts of the path are known keys."""
    annotation: Any = Recipe
    field: FieldInfo | None = None
    for depth, part in enumerate(path):
        value = mapping_value(annotation)
        section = _section_of(annotation)
        if value is not None:
            annotation, field = value, None
        elif section is not None and part in section.model_fields:
            field = section.model_fields[part]
            annotation = field.annotation
        else:
            return annotation, field, depth
    return annotation, field, len(path)


def _describe_type(annotation: Any) -> str:
    parts = []
    for member in _alternatives(annotation):
        if get_origin(member) is Literal:
            parts.append(", ".join(str(value) for value in get_args(member)))
        elif get_origin(member) is list:
            parts.append(f"a list of: {_describe_type(get_args(member)[0])}")
        elif get_origin(member) is tuple:
            parts.append(f"a list of {len(get_args(member))} numbers")
        elif mapping_value(member) is not None:
            parts.append("a mapping of names")
        elif _section_of(member) is not None:
            parts.append("a section with the keys " + ", ".join(_section_of(member).model_fields))  # type: ignore[union-attr]
        else:
            parts.append(_PLAIN.get(member, str(member)))
    return " or ".join(parts)


def describe_allowed(path: list[str]) -> str:
    """What a key allows, in words, bounds included."""
    annotation, field, _ = annotation_at(path)
    text = _describe_type(annotation)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in (field.metadata if field else [])
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    patterns = [
        f"matching {rule.pattern}" for rule in (field.metadata if field else []) if getattr(rule, "pattern", None)
    ]
    return " ".join([text, " and ".join(bounds), *patterns]).strip().replace("  ", " ")


def describe_meaning(path: list[str]) -> str:
    """The description of a key, or nothing."""
    _, field, _ = annotation_at(path)
    return (field.description or "") if field else ""


def every_key(annotation: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Every key path of a recipe; names of the user's choice stand as `<name>`."""
    value = mapping_value(annotation)
    section = _section_of(annotation)
    if value is not None:
        yield from every_key(value, f"{prefix}<name>.")
    elif section is not None:
        for name, field in section.model_fields.items():
            yield f"{prefix}{name}"
            yield from every_key(field.annotation, f"{prefix}{name}.")


def did_you_mean(path: list[str]) -> str:
    """A sentence that helps with an unknown key: a close name of its section, the same name elsewhere, or all names."""
    annotation, _, known = annotation_at(path)
    section = _section_of(annotation)
    names = list(section.model_fields) if section else []
    before, unknown = path[:known], path[known]
    close = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join([*before, close[0], *path[known + 1 :]])}?"
    elsewhere = [key for key in every_key() if key.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    last_parts = {key.rsplit(".", 1)[-1]: key for key in every_key()}
    close = difflib.get_close_matches(path[-1], list(last_parts), n=1, cutoff=0.75)
    if close:
        return f"did you mean {last_parts[close[0]]}?"
    if not names:
        return f"{'.'.join(before)} holds {_describe_type(annotation)}, no keys"
    return f"allowed in {'.'.join(before) or 'a recipe'}: {', '.join(names)}"
