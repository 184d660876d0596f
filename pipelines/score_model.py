"""Score one model on the held-out text of a recipe: loss and perplexity per domain, size, memory and speed.

    python pipelines/score_model.py MODEL_DIR RECIPE.yaml [key.sub=value ...] [--json] [--verbose]

The corpus has to be prepared, by pipelines/prepare_corpus.py or by a run. Perplexity is exp(mean next-token loss) over
whole stored sequences, side by side without overlap; nothing is put before a sequence, and its first token is read and
not predicted.
"""

import argparse
import json
import sys
from typing import Any

from orchestrator.console import Console
from orchestrator.prepared_corpus import find_prepared_corpus
from orchestrator.ray_session import RaySession
from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe
from orchestrator.report_text import byte_size, nats, perplexity, whole
from shearing.errors import UserError
from shearing.models.family import vocabulary_of
from shearing.storage import open_store


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Exits with status 2 for a wrong one."""
    parser = argparse.ArgumentParser(description="Loss, perplexity, size and speed of a Hugging Face directory.")
    parser.add_argument("model", metavar="MODEL_DIR", help="Hugging Face directory, a path or a URI")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="names the corpus and how scores are taken")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says too")
    return parser.parse_intermixed_args(arguments)


def score(options: argparse.Namespace, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Scores and protocol. Raises UserError for what a user has to change, before Ray starts where it can."""
    folder = open_store(options.model)
    problems = []
    if not folder.exists("config.json"):
        problems.append(f"{options.model} holds no config.json; name a Hugging Face model directory")
    try:
        corpus, manifest = find_prepared_corpus(recipe, options.recipe)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    with RaySession(recipe, verbose=options.verbose) as session:
        from shearing.evaluation.scoring import ScoreProtocol, check_vocabulary
        from shearing.evaluation.throughput import Load

        check_vocabulary(options.model, vocabulary_of(folder.read_json("config.json")), manifest.tokenizer.vocab_size)
        session.start(console)
        from actors.scoring import score_models

        engine, scores = recipe.engine, recipe.scores
        protocol = ScoreProtocol(
            corpus_uri=corpus.uri,
            sequences_per_domain=recipe.evaluation.sequences_per_domain,
            batch_sequences=engine.micro_batch_sequences,
            load=Load(scores.prompt_tokens, scores.decode_tokens, scores.batch_sequences),
            dtype=engine.dtype,
            device="cuda" if engine.gpus_per_worker else "cpu",
            threads=max(1, int(engine.cpus_per_worker)),
            trust_remote_code=recipe.source.trust_remote_code,
        )
        gpus = min(1.0, engine.gpus_per_worker)
        found = score_models({"model": folder.uri}, protocol, ("model",), cpus=engine.cpus_per_worker, gpus=gpus)
    return {
        "model": options.model,
        "corpus": corpus.uri,
        "scores": found["models"]["model"],
        "protocol": found["protocol"],
    }


def table(found: dict[str, Any]) -> str:
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


def main(arguments: list[str] | None = None) -> int:
    """Score and print. Returns the exit status: 2 for what a user has to change."""
    options = parse(arguments)
    console = Console(sys.stderr, verbose=options.verbose)
    try:
        found = score(options, load_recipe(options.recipe, options.overrides), console)
    except UserError as error:
        console.close()
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    console.close()
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
