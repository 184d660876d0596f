"""Score one model: loss and perplexity on a recipe's held-out text, tasks, perplexity on a given text, size and speed.

    python pipelines/score_model.py MODEL_DIR RECIPE.yaml [key.sub=value ...] [--json] [--verbose]
        [--tasks NAME,NAME,... [--fewshot N] [--limit N] [--task-files DIR]]
        [--text FILE [--window N] [--stride N] [--bos yes|no]]

With neither --tasks nor --text: loss and perplexity per domain, size, memory and speed. The corpus has to be
prepared, by pipelines/prepare_corpus.py or by a run. Perplexity is exp(mean next-token loss) over whole stored
sequences, side by side without overlap; nothing is put before a sequence, and its first token is read and not
predicted.

--tasks: these, by the LM evaluation harness (`pip install 'lm-eval==0.4.13'`). --text: perplexity on this one file, as
papers give it for WikiText-2. Either needs no corpus; the recipe says on how many CPUs or GPUs and in which type.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from orchestrator.cluster_fit import scoring_demands
from orchestrator.command import DONE, Command, end_without_ray, run_command
from orchestrator.console import Console
from orchestrator.prepared_corpus import find_prepared_corpus
from orchestrator.ray_session import RaySession
from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe
from orchestrator.report_text import ABSENT, byte_size, nats, perplexity, whole
from orchestrator.scoring_settings import inference_settings, protocol_of, task_resources
from orchestrator.stores import open_named
from shearing.errors import UserError
from shearing.evaluation.config import TasksConfig, TextConfig
from shearing.models.family import vocabulary_of


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options. Exits with status 2 for a wrong one."""
    parser = argparse.ArgumentParser(description="Loss, perplexity, tasks, size and speed of a Hugging Face directory.")
    parser.add_argument("model", metavar="MODEL_DIR", help="Hugging Face directory, a path or a URI")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="names the corpus and how scores are taken")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says too")
    tasks = parser.add_argument_group("tasks of the LM evaluation harness")
    tasks.add_argument("--tasks", type=names, metavar="NAME,NAME,...", help="tasks, groups or tags")
    tasks.add_argument("--fewshot", type=at_least(0), metavar="N", help="examples; default as each task says")
    tasks.add_argument("--limit", type=at_least(1), metavar="N", help="first questions of each task; default all")
    tasks.add_argument("--task-files", metavar="DIR", help="folder of task files, whose data paths are relative to it")
    text = parser.add_argument_group("perplexity on a text")
    text.add_argument("--text", metavar="FILE", help="UTF-8, a path or a URI; tokenised whole")
    text.add_argument("--window", type=at_least(2), metavar="N", help="positions; default the model's, 2048 at most")
    text.add_argument("--stride", type=at_least(1), metavar="N", help="tokens between windows; default side by side")
    text.add_argument("--bos", choices=("yes", "no"), help="whether begin-of-text opens each window; default no")
    return parser.parse_intermixed_args(arguments)


def at_least(least: int) -> Any:
    """A whole number no smaller than this, for argparse."""

    def number(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is given; a whole number from {least} on is needed")
        return int(value)

    return number


def names(value: str) -> list[str]:
    """Names between commas, for argparse."""
    found = [name.strip() for name in value.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("no name is given; name tasks as in --tasks piqa,arc_easy")
    return found


def asked_for(options: argparse.Namespace) -> tuple[TasksConfig | None, TextConfig | None]:
    """What of tasks and text the options ask for. Raises UserError where an option belongs to neither."""
    problems = [
        f"--{name.replace('_', '-')} says something about --{group}, which is not given; give --{group} too"
        for group, members in (("tasks", ("fewshot", "limit", "task_files")), ("text", ("window", "stride", "bos")))
        for name in members
        if getattr(options, group) is None and getattr(options, name) is not None
    ]
    if problems:
        raise UserError(problems)
    tasks = text = None
    if options.tasks is not None:
        files = None if options.task_files is None else str(Path(options.task_files).absolute())
        tasks = TasksConfig(names=options.tasks, fewshot=options.fewshot, limit=options.limit, files=files)
    if options.text is not None:
        file, bos = open_named("--text", options.text).uri, options.bos == "yes"
        text = TextConfig(file=file, window_tokens=options.window, stride_tokens=options.stride, bos=bos)
    return tasks, text


def score(options: argparse.Namespace, recipe: Recipe, console: Console) -> dict[str, Any]:
    """What is asked for. Raises UserError for what a user has to change, before Ray starts where it can."""
    tasks, text = asked_for(options)
    if tasks is None and text is None:
        return score_held_out(options, recipe, console)
    folder, problems, found = open_named("MODEL_DIR", options.model), [], {"model": options.model}
    if not folder.exists("config.json"):
        raise UserError(no_model(options.model))
    offline = os.environ["HF_HUB_OFFLINE"] != "0" if "HF_HUB_OFFLINE" in os.environ else options.task_files is not None
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from shearing.evaluation.harness import check_tasks
    from shearing.evaluation.inference import Inference
    from shearing.evaluation.text_perplexity import plan_windows

    inference, resources = Inference(**inference_settings(recipe)), task_resources(recipe)
    for check in (lambda: tasks and check_tasks(tasks), lambda: text and plan_windows(text, folder.uri, inference)):
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    with scoring_session(options, recipe, console) as session:
        session.start(console)
        from actors.scoring import score_tasks, score_text

        if tasks is not None:
            found |= {"tasks": score_tasks(folder.uri, tasks, inference, offline=offline, **resources)}
        if text is not None:
            found |= {"text": score_text(folder.uri, text, inference, **resources)}
    return found


def scoring_session(options: argparse.Namespace, recipe: Recipe, console: Console) -> RaySession:
    """Ray for one task at a time."""
    on_lost = partial(end_without_ray, console)
    return RaySession(recipe, options.verbose, demands=scoring_demands, on_lost=on_lost)


def no_model(model: str) -> str:
    """The message about a folder that is no model."""
    return f"{model} holds no config.json; name a Hugging Face model directory"


def score_held_out(options: argparse.Namespace, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Scores and protocol on the recipe's corpus. Raises UserError, before Ray starts where it can."""
    folder = open_named("MODEL_DIR", options.model)
    problems = []
    if not folder.exists("config.json"):
        problems.append(no_model(options.model))
    try:
        corpus, manifest = find_prepared_corpus(recipe, options.recipe)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    with scoring_session(options, recipe, console) as session:
        from shearing.evaluation.scoring import check_vocabulary

        check_vocabulary(options.model, vocabulary_of(folder.read_json("config.json")), manifest.tokenizer.vocab_size)
        session.start(console)
        from actors.scoring import score_models

        protocol = protocol_of(recipe, corpus.uri)
        found = score_models({"model": folder.uri}, protocol, ("model",), **task_resources(recipe))
    return {
        "model": options.model,
        "corpus": corpus.uri,
        "scores": found["models"]["model"],
        "protocol": found["protocol"],
    }


def table(found: dict[str, Any]) -> str:
    """Whatever was found as text, with the protocol that it holds for."""
    parts = [make(found[part]) for part, make in (("tasks", tasks_table), ("text", text_table)) if part in found]
    return "\n\n".join([found["model"], *parts]) if parts else held_out_table(found)


def tasks_table(found: dict[str, Any]) -> str:
    """Metrics of each task with standard errors, versions and numbers of examples."""
    width = max(len("task"), *map(len, found["tasks"]))
    head = f"{'task':{width}}  {'version':>7}  {'examples':>8}  {'questions':>9}  {'metric':24}  {'value':>7}"
    lines = [f"{head}  {'stderr':>7}"]
    for name, task in found["tasks"].items():
        for metric, figures in task["metrics"].items():
            stated = [ABSENT if task[key] is None else task[key] for key in ("version", "fewshot", "questions")]
            stderr = ABSENT if figures["stderr"] is None else f"{figures['stderr']:.4f}"
            value = f"{figures['value']:.4f}" if isinstance(figures["value"], float) else str(figures["value"])
            lines.append(
                f"{name:{width}}  {stated[0]:>7}  {stated[1]:>8}  {stated[2]:>9}  {metric:24}  {value:>7}  {stderr:>7}"
            )
    protocol = found["protocol"]
    limit = "all questions" if protocol["limit"] is None else f"the first {protocol['limit']} questions of each task"
    opening = "nothing" if not protocol["opening_token_ids"] else f"tokens {protocol['opening_token_ids']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{protocol['harness']}, {limit}; standard error {protocol['stderr']}.",
            f"The tokenizer puts {opening} before a question; beyond {whole(protocol['most_tokens'])} tokens it is cut "
            f"from the left. {protocol['dtype']} on {protocol['device']}.",
        ]
    )


def text_table(found: dict[str, Any]) -> str:
    """Loss and perplexity on one text."""
    protocol = found["protocol"]
    return "\n".join(
        [
            f"{protocol['file']}: loss {nats(found['loss'])}, perplexity {found['perplexity']:.4f}",
            "",
            f"Perplexity: {protocol['perplexity']}: {whole(protocol['predicted_tokens'])} of "
            f"{whole(protocol['text_tokens'])} tokens in {whole(protocol['windows'])} windows.",
            f"Windows: {protocol['window_rule']}.",
            f"Beginning: {protocol['bos_rule']}.",
            f"{protocol['dtype']} on {protocol['device']}; SHA-256 of the text {protocol['sha256']}.",
        ]
    )


def held_out_table(found: dict[str, Any]) -> str:
    """Scores as text, with the protocol that they hold for."""
    scores, protocol = found["scores"], found["protocol"]
    width = max(len("domain"), *map(len, scores["losses"]))
    lines = [found["model"], "", f"{'domain':{width}}  {'loss':>7}  {'perplexity':>10}  {'predicted tokens':>16}"]
    for domain, loss in scores["losses"].items():
        figures = (nats(loss), perplexity(scores["perplexity"][domain]), whole(protocol["predicted_tokens"][domain]))
        lines.append(f"{domain:{width}}  {figures[0]:>7}  {figures[1]:>10}  {figures[2]:>16}")
    lines += [f"{'mean':{width}}  {nats(scores['mean_loss']):>7}  ({protocol['mean_loss']})", ""]
    speeds = {
        kind: f"{whole(scores[f'{kind}_tokens_per_s'])} ({' to '.join(map(whole, scores[f'{kind}_quartiles']))})"
        for kind in ("prefill", "decode")
    }
    sizes = {
        "parameters": whole(scores["parameters"]),
        "prunable parameters": whole(scores["prunable_parameters"]),
        "on disk": byte_size(scores["disk_bytes"]),
        "peak memory": byte_size(scores["peak_memory_bytes"]),
        "prefill tokens/s": speeds["prefill"],
        "decoding tokens/s": speeds["decode"],
    }
    lines += [f"{name:22}{value}" for name, value in sizes.items()]
    lines += [
        "",
        f"Loss in nats a token; perplexity: {protocol['perplexity']}.",
        f"Windows: {protocol['windows']}; {protocol['sequence_tokens']} tokens each, split {protocol['split']}.",
        f"Beginning: {protocol['bos_rule']}.",
        f"Speed: {protocol['load_batch_sequences']} x {protocol['prompt_tokens']} prompt tokens, then "
        f"{protocol['decode_tokens']} more with a key-value cache; median (quartiles) of {protocol['repeats']} rounds, "
        f"{protocol['dtype']} on {protocol['device']}, threads: {protocol['threads']}.",
    ]
    return "\n".join(lines)


def score_and_show(options: argparse.Namespace, command: Command, console: Console, out: TextIO) -> int:
    """The job of the command line. Raises UserError for what a user has to change."""
    found = score(options, load_recipe(command.recipe, command.overrides), console)
    console.close()
    out.write((json.dumps(found, indent=2) if options.json else table(found)) + "\n")
    return DONE


def main(arguments: list[str]) -> int:
    """Score and print. Returns the exit status."""
    options = parse(arguments)
    command = Command(options.recipe, options.overrides, verbose=options.verbose)
    return run_command(command, sys.stdout, sys.stderr, partial(score_and_show, options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
