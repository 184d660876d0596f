"""What docs/pruning.md says about choosing is so."""

import re
from pathlib import Path
from typing import get_args

from orchestrator.recipe_schema import every_key
from shearing.models.families import FAMILIES
from shearing.pruning.config import Method, PruningTarget

PAGE = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")


def test_every_key_is_one_of_a_recipe():
    """A key that was renamed since the page was written."""
    named = set(re.findall(r"`((?:pruning|watchdog)\.[a-z_.]+)`", PAGE))
    assert len(named) > 12
    assert named <= set(every_key())


def test_methods_and_targets_are_all_there():
    methods = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert methods | {"learned"} == set(get_args(Method))
    for name in PruningTarget.model_fields:
        assert f"`{name}`" in PAGE or f"{name}:" in PAGE, name


def test_families_that_cofi_leaves_out_are_named():
    quotient = {name for name, family in FAMILIES.items() if family.head_size_from_hidden}
    (sentence,) = re.findall(r"Not for (.*?), whose head size", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == quotient
