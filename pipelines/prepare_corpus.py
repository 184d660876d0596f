"""Prepare the corpus of a recipe: tokenise, pack and split its text on all cores.

    python pipelines/prepare_corpus.py RECIPE.yaml [key.sub=value ...] [--verbose]

A corpus that is there already is shown as it is.
"""

import argparse
import sys
from functools import partial
from typing import TextIO

from orchestrator.cluster_fit import no_demands
from orchestrator.command import DONE, Command, end_without_ray, run_command
from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.recipe_loading import load_recipe
from orchestrator.stores import open_named
from shearing.data.manifest import Manifest
from shearing.data.raw_files import list_domains
from shearing.errors import UserError

COLUMNS = ("domain", "split", "documents", "sequences", "tokens", "text MB", "dropped tokens")


def parse(arguments: list[str]) -> Command:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Tokenise, pack and split the text of a recipe on all cores.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says too")
    found = parser.parse_args(arguments)
    return Command(found.recipe, found.overrides, verbose=found.verbose)


def prepare(command: Command, console: Console, out: TextIO) -> int:
    """Prepare the corpus of a recipe and print its table. Raises UserError for what a user has to change."""
    recipe = load_recipe(command.recipe, command.overrides)
    open_named("corpus.path", recipe.corpus.path)  # what cannot be had is said before Ray takes its seconds to start
    list_domains(recipe.corpus)
    if recipe.source.model is None and recipe.source.train is None:
        raise UserError("source.model and source.train are both empty: the corpus needs a tokenizer. Set one of them.")
    on_lost = partial(end_without_ray, console)
    with RaySession(recipe, command.verbose, runs_at_once=0, demands=no_demands, on_lost=on_lost) as session:
        session.start(console)
        from actors.corpus import prepare_corpus

        tokenizer_dir = recipe.source.model
        if tokenizer_dir is None:
            from shearing.data.tokenizer_training import ensure_trained_tokenizer

            assert recipe.source.train is not None
            console.note(f"learning a tokenizer of {recipe.source.train.tokenizer.vocab_size:,} tokens")
            tokenizer_dir = ensure_trained_tokenizer(recipe.corpus, recipe.source.train.tokenizer)
        store, manifest = prepare_corpus(recipe.corpus, tokenizer_dir, console.note)
    out.write(f"{table(manifest)}\ncorpus: {store.uri}\n")
    return DONE


def table(manifest: Manifest) -> str:
    """What the corpus holds by domain and split, and which lines were left out."""
    rows = [COLUMNS] + [
        (
            domain,
            split,
            f"{entry.documents:,}",
            f"{entry.sequences:,}",
            f"{entry.tokens:,}",
            f"{entry.text_bytes / 1e6:,.2f}",
            f"{entry.dropped_tokens:,}",
        )
        for domain, splits in manifest.domains.items()
        for split, entry in splits.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(f"{cell:{'<' if column < 2 else '>'}{widths[column]}}" for column, cell in enumerate(row))
        for row in rows
    ]
    lines.append(f"malformed lines: {manifest.malformed_lines:,} of {manifest.lines:,}")
    lines += [f"  {line.path}:{line.line}: {line.problem}" for line in manifest.malformed]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(parse(sys.argv[1:]), sys.stdout, sys.stderr, prepare))
