"""YAML as people mean it: the core schema of YAML 1.2, duplicate keys refused.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false, `10:30` is 630, `017` is 15 and a date is an object.
"""

import re
from typing import Any

import yaml

from shearing.errors import UserError

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+0123456789.",
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML looks for them here

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands here twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes what the loader would take for something else than text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML looks for them here

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(
        str(loader.construct_scalar(node))
        .replace("_", "")
        .replace(".inf", "inf")
        .replace(".Inf", "inf")
        .replace(".nan", "nan")
        .replace(".NaN", "nan")
    )


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError with file, line and column; `where` names the text."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: {error.problem or error.context}. Correct the YAML there.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not readable as YAML: {error}") from None


def write_yaml(value: Any) -> str:
    """YAML text that `read_yaml` turns into the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
