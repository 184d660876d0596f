"""Methods side by side: one source model, one corpus, one protocol, equal parameters, with and without recovery.

    python pipelines/compare_methods.py RECIPE.yaml [key.sub=value ...]
    python pipelines/compare_methods.py RECIPE.yaml --methods learned cofi scratch      some of them
    python pipelines/compare_methods.py RECIPE.yaml --plan                              what would run; starts nothing

Run again after a stop of any kind, every method goes on where it stopped.
"""

import argparse
import sys

from orchestrator.command import Command, run_command
from orchestrator.comparison_command import compare
from orchestrator.recipe import COMPARED_METHODS


def parse(arguments: list[str]) -> Command:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare methods that make a language model smaller.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(COMPARED_METHODS)}")
    parser.add_argument("--plan", action="store_true", help="show what would run and what is missing; start nothing")
    parser.add_argument("--verbose", action="store_true", help="let Ray's and DeepSpeed's own output through")
    parser.add_argument("--dashboard", action="store_true", help="serve Ray's dashboard where Ray is embedded")
    found = parser.parse_intermixed_args(arguments)
    names = found.methods or []
    overrides = [*found.overrides, *(name for name in names if "=" in name)]
    if names:
        overrides.append(f"comparison.methods=[{', '.join(name for name in names if '=' not in name)}]")
    return Command(found.recipe, overrides, found.plan, found.verbose, found.dashboard)


if __name__ == "__main__":
    sys.exit(run_command(parse(sys.argv[1:]), sys.stdout, sys.stderr, compare))
