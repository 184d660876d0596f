"""The method's claims in miniature: about a hundred small trainings on real text, and what came of them.

    python benchmarks/study/study.py [--claims scratch mixture ...] [--seeds 3] [--jobs 2] [--folder runs/study]
    python benchmarks/study/study.py --write-up        # tables and figures of what is there, into docs/

Each task is a process of its own with one thread, as many at a time as there are cores (one where there is a GPU); the
source, which all others await, has every core. A finished task is never run again, one that was stopped goes on from
its checkpoint; more seeds or claims add to the study.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from study_tasks import CLAIMS, RESULT, Budget, Kind, Task, study_tasks

from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe
from orchestrator.workspace import fingerprint

RECIPE = Path(__file__).with_name("study.yaml")
READ_BY_ALL = ("seed", "corpus", "source", "engine", "evaluation", "watchdog")
READ_BY: dict[Kind, tuple[str, ...]] = {
    "source": (),
    "prune": ("references", "mixture", "pruning"),
    "train": ("references", "mixture", "recovery"),
    "speed": ("scores",),
}
"""Sections of the recipe: a change of another one leaves a finished task as it is."""


def recipe_of(task: Task, overrides: list[str]) -> Recipe:
    """The shared recipe with the study's overrides and the task's."""
    return load_recipe(str(RECIPE), [*overrides, *task.overrides])


def prepare(recipe: Recipe) -> str:
    """The corpus, made by this process. Returns its URI."""
    from shearing.data.preparation import prepare_in_process
    from shearing.data.tokenizer_training import ensure_trained_tokenizer

    assert recipe.source.train is not None
    tokenizer_dir = ensure_trained_tokenizer(recipe.corpus, recipe.source.train.tokenizer)
    corpus, _ = prepare_in_process(recipe.corpus, tokenizer_dir)
    return corpus.uri


def carry_out(task: Task, overrides: list[str], corpus: str, study: Path, prints: dict[str, str]) -> dict[str, Any]:
    """One task in this process; its result is written last."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import logging

    import torch
    from study_training import run_task
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1 if task.models else os.cpu_count() or 1)  # nothing runs beside the source
    folder = study / task.name
    mark = folder / "fingerprint"
    if not mark.is_file() or mark.read_text() != prints[task.name]:  # what is there was begun from something else
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(prints[task.name])
    models = {name: study / name / "model" for name in {"source", *task.models}}
    result = run_task(task, recipe_of(task, overrides), corpus, folder, models)
    result |= {"task": task.name, "fingerprint": prints[task.name]}
    partial = folder / (RESULT + ".partial")
    partial.write_text(json.dumps(result))
    partial.rename(folder / RESULT)
    return result


def fingerprints(tasks: list[Task], overrides: list[str], corpus: str) -> dict[str, str]:
    """What each task's result rests on: the sections that it reads, the corpus, and the tasks it starts from."""
    prints: dict[str, str] = {}
    for task in tasks:
        before = [prints[name] for name in task.models]
        read = {*READ_BY_ALL, *READ_BY[task.kind], *(["scratch"] if task.fresh else [])}
        sections = recipe_of(task, overrides).model_dump(mode="json", include=read)
        prints[task.name] = fingerprint({"recipe": sections, "corpus": corpus, "fresh": task.fresh, "before": before})
    return prints


def is_done(task: Task, study: Path, prints: dict[str, str]) -> bool:
    """Whether the task's result is there, and of this recipe."""
    path = study / task.name / RESULT
    return path.is_file() and json.loads(path.read_text())["fingerprint"] == prints[task.name]


def run_all(tasks: list[Task], options: argparse.Namespace, corpus: str) -> int:
    """Every task that is not done, those first that others wait for. Returns how many failed."""
    study, prints = Path(options.folder).resolve(), fingerprints(tasks, options.overrides, corpus)
    done = {task.name for task in tasks if is_done(task, study, prints)}
    waiting = [task for task in tasks if task.name not in done]
    print(f"{len(tasks)} tasks, {len(done)} done already; {options.jobs} at a time", flush=True)
    running: dict[Future[dict[str, Any]], Task] = {}
    failed: list[str] = []
    began_s = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        while waiting or running:
            ready = [task for task in waiting if set(task.models) <= done]
            for task in ready[: options.jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(carry_out, task, options.overrides, corpus, study, prints)] = task
            if not running:  # what is left waits for a task that failed
                failed += [task.name for task in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    result = future.result()
                except Exception as error:
                    failed.append(task.name)
                    print(f"{task.name} FAILED: {error!r}", flush=True)
                    continue
                done.add(task.name)
                loss = f"{result['mean_loss']:.4f} nats a token, " if "mean_loss" in result else ""
                minutes = (time.perf_counter() - began_s) / 60
                print(
                    f"{len(done)}/{len(tasks)} {task.name}: {loss}{result['seconds']:.0f} s; {minutes:.1f} min in all",
                    flush=True,
                )
    return len(failed)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over study.yaml for every task")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", default="runs/study")
    parser.add_argument("--list", action="store_true", help="print the tasks and end")
    parser.add_argument("--write-up", action="store_true", help="tables and figures of the finished tasks, into docs/")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run the study, or write it up."""
    options = parse()
    if options.write_up:
        from study_write_up import write_up

        write_up(Path(options.folder), Path(__file__).parents[2] / "docs")
        return 0
    recipe = load_recipe(str(RECIPE), options.overrides)
    budget = Budget.of(recipe)
    tasks = study_tasks(options.claims, range(1, options.seeds + 1), budget)
    if options.list:
        print("\n".join(f"{task.name:32} {' '.join(task.overrides)}" for task in tasks))
        return 0
    return 1 if run_all(tasks, options, prepare(recipe)) else 0


if __name__ == "__main__":
    sys.exit(main())
