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
from orchestrator.recipe import Recipe
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
    _check_measures(recipe)
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


def _check_measures(recipe: Recipe) -> None:
    """What of tasks and text cannot be known without torch. Raises UserError with every problem."""
    assert recipe.comparison is not None
    problems: list[str] = []
    tasks, text, source = recipe.comparison.tasks, recipe.comparison.text, recipe.source.model
    if tasks is not None:
        from shearing.evaluation.harness import check_tasks  # loads the harness, where it is installed

        try:
            check_tasks(tasks)
        except UserError as error:
            problems += error.problems
    if text is not None and source is not None:  # the tokenizer of a source that is trained here has a begin of text
        from shearing.evaluation.inference import Inference
        from shearing.evaluation.text_perplexity import plan_windows

        inference = Inference(batch_sequences=1, trust_remote_code=recipe.source.trust_remote_code)
        try:
            plan_windows(text, source, inference)
        except UserError as error:
            problems += [f"comparison.text: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
