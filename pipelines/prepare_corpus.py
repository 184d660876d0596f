"""Prepare the corpus of a recipe: tokenise, pack and split its text on all cores.

    python pipelines/prepare_corpus.py RECIPE.yaml [key.sub=value ...] [--verbose]

A corpus that is there already is shown as it is.
"""

import argparse
import sys

from orchestrator.console import Console
from orchestrator.ray_session import RaySession
from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe
from shearing.data.manifest import Manifest
from shearing.data.raw_files import list_domains
from shearing.errors import UserError
from shearing.storage import Store

COLUMNS = ("domain", "split", "documents", "sequences", "tokens", "text MB", "dropped tokens")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Exits with status 2 for a wrong one."""
    parser = argparse.ArgumentParser(description="Tokenise, pack and split the text of a recipe on all cores.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values laid over the recipe")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says too")
    return parser.parse_args(arguments)


def prepare(recipe: Recipe, console: Console, verbose: bool) -> tuple[Store, Manifest]:
    """The corpus of a recipe and its manifest. Raises UserError for what a user has to change."""
    list_domains(recipe.corpus)  # what is not there is said before Ray takes its seconds to start
    if recipe.source.model is None and recipe.source.train is None:
        raise UserError("source.model and source.train are both empty: the corpus needs a tokenizer. Set one of them.")
    with RaySession(recipe, verbose=verbose) as session:
        session.start(console)
        from actors.corpus import prepare_corpus

        tokenizer_dir = recipe.source.model
        if tokenizer_dir is None:
            from shearing.data.tokenizer_training import ensure_trained_tokenizer

            assert recipe.source.train is not None
            console.note(f"learning a tokenizer of {recipe.source.train.tokenizer.vocab_size:,} tokens")
            tokenizer_dir = ensure_trained_tokenizer(recipe.corpus, recipe.source.train.tokenizer)
        return prepare_corpus(recipe.corpus, tokenizer_dir, console.note)


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


def main(arguments: list[str] | None = None) -> int:
    """Prepare and print the table. Returns the exit status: 2 for what a user has to change."""
    options = parse(arguments)
    console = Console(sys.stderr, verbose=options.verbose)
    try:
        store, manifest = prepare(load_recipe(options.recipe, options.overrides), console, options.verbose)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    print(table(manifest))
    print(f"corpus: {store.uri}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
