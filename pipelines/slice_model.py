"""SliceGPT: from text in domains and a model to one whose residual stream is narrower, with recovery and a report.

    python pipelines/slice_model.py RECIPE.yaml key.sub=value ...     any recipe; `slicing` says how, or its defaults
    python pipelines/slice_model.py RECIPE.yaml --plan                what would run; starts nothing

Without a section `recovery` the sliced model is the result. Run again after a stop of any kind, it goes on at the last
finished layer.
"""

import sys
from pathlib import Path

from orchestrator.command import parse, run_command

QUICKSTART = Path(__file__).resolve().parent / "recipes" / "quickstart.yaml"
DESCRIPTION = "Slice a language model's residual stream by rotation (SliceGPT), and recover it."

if __name__ == "__main__":
    command = parse(sys.argv[1:], "slicing", DESCRIPTION, QUICKSTART)
    sys.exit(run_command(command, sys.stdout, sys.stderr))
