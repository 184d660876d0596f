"""One fact of a report's verdict."""

from typing import Any

Fact = dict[str, Any]


def fact(key: str, level: str, title: str, value: str, why: str) -> Fact:
    """A title, its figure and why it matters; levels as in `orchestrator.report_verdict`."""
    return {"key": key, "level": level, "title": title, "value": value, "why": why}
