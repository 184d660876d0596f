"""What docs/SCALING.md says is what the code computes."""

import re
from pathlib import Path

import yaml

from orchestrator.hardware import HardwareConfig
from orchestrator.recipe_loading import load_recipe
from orchestrator.scaling_tables import DOMAINS, EVALUATION_SEQUENCES, PRUNING, RECOVERY, SEQUENCE_TOKENS, tables

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code():
    """A constant that moved, and a page that still promises the old hours. Mend it by what `tables()` returns."""
    found = dict(re.findall(r"<!-- scaling:(\S+) -->\n(.*?)\n<!-- end -->", PAGE, flags=re.DOTALL))
    assert found == tables()


def test_the_recipe_is_the_shipped_one():
    """The page says so; a schedule written twice is soon two schedules."""
    recipe = load_recipe(str(ROOT / "pipelines" / "recipes" / "sheared-llama-1.3b.yaml"), [])
    for phase, shown in ((recipe.pruning, PRUNING), (recipe.recovery, RECOVERY)):
        for key in ("steps", "global_batch_tokens", "evaluate_every_steps", "checkpoint_every_steps"):
            assert getattr(phase, key) == getattr(shown, key), key
    assert recipe.evaluation.sequences_per_domain == EVALUATION_SEQUENCES
    assert (len(recipe.corpus.domains), recipe.corpus.sequence_tokens) == (DOMAINS, SEQUENCE_TOKENS)


def test_the_section_shown_is_one():
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    section = HardwareConfig.model_validate(yaml.safe_load(shown)["hardware"])
    assert section.device == "H100"
