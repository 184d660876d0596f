"""The main job: from text in domains and a model to a smaller model and a report.

    python pipelines/shear.py                                   recipes/quickstart.yaml
    python pipelines/shear.py RECIPE.yaml key.sub=value ...     any recipe, any override
    python pipelines/shear.py RECIPE.yaml --plan                what would run; starts nothing

Run again after a stop of any kind, it goes on where it stopped.
"""

import sys
from pathlib import Path

from orchestrator.command import parse, run_command

QUICKSTART = Path(__file__).resolve().parent / "recipes" / "quickstart.yaml"
DESCRIPTION = "Make a smaller, strong language model from a pretrained one."

if __name__ == "__main__":
    command = parse(sys.argv[1:], "pruning", DESCRIPTION, QUICKSTART)
    sys.exit(run_command(command, sys.stdout, sys.stderr))
