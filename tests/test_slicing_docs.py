"""What docs/slicing.md says is so."""

import re
from pathlib import Path

import pytest

from shearing.models.families import FAMILIES
from shearing.models.parameters import count_parameters
from shearing.pruning.config import CalibrationConfig
from shearing.pruning.slicing.config import DEFAULT_FRACTION, SlicingConfig
from shearing.pruning.slicing.plan import MULTIPLE, sliced_parameters

PAGE = (Path(__file__).parents[1] / "docs" / "slicing.md").read_text(encoding="utf-8")
FLOWING = " ".join(PAGE.split())
LLAMA_2_7B = {"model_type": "llama", "num_key_value_heads": 32}  # all else by default
OPT_125M = {"model_type": "opt"}


def test_every_key_is_there():
    """A key that was renamed, or that nobody has read about."""
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(SlicingConfig.model_fields)
    assert f"{DEFAULT_FRACTION} if nothing is said; what stays is rounded down to a multiple of {MULTIPLE}" in FLOWING
    assert f"{CalibrationConfig().sequences} if nothing is said" in FLOWING


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (LLAMA_2_7B, {}, "Of Llama-2-7B, 25 % slicing leaves {} % of the parameters"),
        (LLAMA_2_7B, {"fraction": 0.1}, "10 % leaves {} %; of OPT-125M"),
        (OPT_125M, {}, "of OPT-125M, 25 % leaves {} %"),
        (LLAMA_2_7B, {"rotation": "shared"}, "a shared rotation leaves {} % of Llama-2-7B's"),
        (LLAMA_2_7B, {}, "where one a signal leaves {} %"),
    ],
)
def test_shares_of_parameters(config, settings, words):
    share = sliced_parameters(config, SlicingConfig(**settings)) / count_parameters(config)
    assert words.format(f"{100 * share:.1f}") in FLOWING


def test_families_are_sorted_as_the_code_sorts_them():
    (sliced,) = re.findall(r"^Sliced: (.*)\.$", PAGE, flags=re.MULTILINE)
    names = {name.strip() for name in re.sub(r"\([^)]*\)", "", sliced).split(",")}
    assert names == {name for name, family in FAMILIES.items() if not family.post_norms}
    (refused,) = re.findall(r"Refused, with the reason: (.*?), because", FLOWING)
    assert set(refused.split(", ")) == {name for name, family in FAMILIES.items() if family.post_norms}
    (heads,) = re.findall(r"`rotation: shared` is refused for (.*?), whose head size", FLOWING)
    quotient = {name for name, family in FAMILIES.items() if family.head_size_from_hidden}
    assert set(re.findall(r"\b(?:gpt_neox|\w*opt\w*|phi\d?|llama)\b", heads)) == quotient
