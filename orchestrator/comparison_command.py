"""The comparison as a job of the command line."""

import time
from functools import partial
from typing import TextIO

from orchestrator.command import DONE, FAILED, TO_MEND, Command, end_without_ray
from orchestrator.comparison_checks import comparison_problems, comparison_recipe, plan_comparison
from orchestrator.comparison_checks import render_comparison_plan as render
from orchestrator.comparison_run import comparison_session
from orchestrator.comparison_stages import COMPARISON_STAGES
from orchestrator.console import Console, format_duration
from orchestrator.recipe_loading import load_recipe
from orchestrator.run import run_recipe
from shearing.errors import UserError


def compare(command: Command, console: Console, out: TextIO) -> int:
    """Run or plan a comparison. Status: as of `run_command`; 1 also where a method failed and the others are done."""
    started = time.monotonic()
    recipe = load_recipe(command.recipe, command.overrides, needs=("pruning", "recovery"))
    if command.plan:
        found = plan_comparison(recipe)
        out.write(render(found))
        return TO_MEND if found.problems else DONE
    recipe = comparison_recipe(recipe)
    if problems := comparison_problems(recipe):
        raise UserError(problems)
    assert recipe.comparison is not None
    if recipe.comparison.tasks is not None:
        from shearing.evaluation.harness import check_tasks  # loads the harness, where it is installed

        check_tasks(recipe.comparison.tasks)
    on_lost = partial(end_without_ray, console)
    session = comparison_session(recipe, command.verbose, command.dashboard, on_lost)
    context = run_recipe(recipe, console, session, COMPARISON_STAGES)
    out.write(f"{context.outputs['comparison']['verdict']}\n")
    out.write(f"{recipe.name}: compared in {format_duration(time.monotonic() - started)}\n")
    out.write(f"  page    {context.outputs['comparison']['path']}/index.html\n")
    failed = context.outputs["methods"]["failed"]
    for name, problems in failed.items():
        out.write(f"  failed  {name}: {problems[0]}\n")
    return FAILED if failed else DONE
