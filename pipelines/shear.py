"""The main job: from text in domains and a model to a smaller model and a report.

    python pipelines/shear.py                                   recipes/quickstart.yaml
    python pipelines/shear.py RECIPE.yaml key.sub=value ...     any recipe, any override
    python pipelines/shear.py RECIPE.yaml --plan                what would run; starts nothing

Run again after a stop of any kind, it goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from orchestrator.command import Command, run_command

QUICKSTART = Path(__file__).resolve().parent / "recipes" / "quickstart.yaml"


def parse(arguments: list[str]) -> Command:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a smaller, strong language model from a pretrained one.")
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe (default: the quickstart), then overrides"
    )
    parser.add_argument("--plan", action="store_true", help="show what would run and what is missing; start nothing")
    parser.add_argument("--verbose", action="store_true", help="let Ray's and DeepSpeed's own output through")
    parser.add_argument("--dashboard", action="store_true", help="serve Ray's dashboard where Ray is embedded")
    found = parser.parse_intermixed_args(arguments)
    recipes = [word for word in found.words if "=" not in word]
    if len(recipes) > 1:
        parser.error(f"one recipe at a time; given: {', '.join(recipes)}. Overrides are written key=value.")
    overrides = [word for word in found.words if "=" in word]
    recipe = recipes[0] if recipes else str(QUICKSTART)
    return Command(recipe, overrides, found.plan, found.verbose, found.dashboard)


if __name__ == "__main__":
    sys.exit(run_command(parse(sys.argv[1:]), sys.stdout, sys.stderr))
