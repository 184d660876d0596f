"""What docs/mixtures.md says about mixtures is so."""

import re
from pathlib import Path

import pytest

from orchestrator.recipe_schema import every_key
from shearing.data.config import RULE_WORDS, MixtureConfig
from shearing.data.mixture import initial_state, next_state, replay

PAGE = (Path(__file__).parents[1] / "docs" / "mixtures.md").read_text(encoding="utf-8")


def test_every_rule_has_a_row():
    """A rule that is announced and missing, or there and unknown."""
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(RULE_WORDS)


def test_the_keys_named_are_keys():
    named = set(re.findall(r"`((?:mixture|references|engine)\.\w+(?:\.\w+)?)", PAGE))
    assert len(named) > 8
    assert named <= set(every_key())


def test_the_rule_shown_is_a_rule(tmp_path, monkeypatch):
    """An example that everybody copies first, with an attribute that was renamed."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "rules_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config, prior = MixtureConfig(rule="rules_of_the_page:half_way"), {"a": 0.5, "b": 0.5}
    states = [initial_state(config, prior)]
    for step, excess in enumerate((1.0, 0.2), start=1):
        losses, references = {"a": 2.0 + excess, "b": 1.0}, {"a": 2.0, "b": 1.0}
        states.append(next_state(states[-1], losses, references, config, prior, step=step))
    assert states[-1].memory == {"worst": {"a": 1.0, "b": 0.0}}
    assert states[-1].proportions["a"] / states[-1].proportions["b"] == pytest.approx(2.718281828)
    assert replay(states, config, prior).equal
