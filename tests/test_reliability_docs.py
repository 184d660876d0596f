"""docs/RELIABILITY.md tells of every fault that tests/chaos brings about, and of nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")


def test_table_names_every_kind_of_fault(monkeypatch):
    """A kind that was added without saying what becomes of it, or a row about one that is no longer struck with."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "chaos"))
    from faults import KINDS

    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(KINDS)
    for name, rest in rows:
        cells = [cell.strip() for cell in rest.split("|")]
        assert len(cells) == 4, name
        assert all(cells), name


def test_paths_and_links_resolve():
    """A test or page that was renamed."""
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    named = re.findall(r"`((?:tests|actors|orchestrator)/[\w/]+(?:\.py)?)", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
