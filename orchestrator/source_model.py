"""What a source model's folder says about it, read without torch or transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.model_files import read_mapping, weight_problems
from orchestrator.recipe import Recipe
from shearing.errors import UserError
from shearing.models.families import FAMILIES, Family
from shearing.models.family import (
    check_config,
    check_shape,
    family_of,
    llama_config,
    shape_of,
    vocabulary_of,
)
from shearing.models.parameters import count_parameters
from shearing.models.shape import Shape
from shearing.pruning.slicing.plan import check_slicing, sliced_config, sliced_parameters
from shearing.pruning.target import check_pruning, target_parameters, target_shape


@dataclass
class SourceFacts:
    """The source model as far as it can be known before the run. Fields are None where a problem hides them."""

    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None
    family: Family | None = None
    shape: Shape | None = None
    target: Shape | None = None
    sliced: dict[str, Any] | None = None
    tokenizer_vocabulary: int | None = None

    @property
    def result(self) -> tuple[dict[str, Any], Shape | None] | None:
        """The smaller model as a config and the shape that it has in place of that config's own, if another."""
        if self.sliced is not None:
            return self.sliced, None
        return (self.config, self.target) if self.config is not None and self.target is not None else None


def trained_source_config(recipe: Recipe, vocabulary: int, boundary_token_id: int | None = None) -> dict[str, Any]:
    """The config.json of a source model that the run trains itself: a llama with room for twice a sequence."""
    assert recipe.source.train is not None
    return llama_config(
        recipe.source.train.shape,
        vocabulary,
        2 * recipe.corpus.sequence_tokens,
        bos_token_id=boundary_token_id,
        eos_token_id=boundary_token_id,
    )


def inspect_source(recipe: Recipe) -> SourceFacts:
    """The source model's config, shape and tokenizer, the target within it, and every problem with them."""
    facts = SourceFacts()
    source = recipe.source
    if (source.model is None) == (source.train is None):
        given = "neither" if source.model is None else "both"
        facts.problems.append(
            f"source.model and source.train: {given} given; a run starts from exactly one. Set source.model to a "
            "Hugging Face directory, or source.train to a model trained here (source.model=null takes the other out)."
        )
        return facts
    if source.train is not None:
        facts.config = trained_source_config(recipe, source.train.tokenizer.vocab_size)
        facts.tokenizer_vocabulary = source.train.tokenizer.vocab_size
        facts.problems += check_shape(FAMILIES["llama"], source.train.shape, "source.train.shape")
    elif source.model is not None:
        _read_directory(facts, Path(source.model).expanduser(), recipe.corpus.boundary_token)
    if facts.config is not None:
        _read_config(facts, recipe)
    return facts


def _read_directory(facts: SourceFacts, folder: Path, boundary_token: str) -> None:
    if not folder.is_dir():
        facts.problems.append(
            f"source.model = {str(folder)!r} is no directory (looked from {Path.cwd()}); download the model first "
            "(`hf download ORGANISATION/NAME --local-dir DIR`) and name that directory."
        )
        return
    facts.problems += weight_problems(folder)
    try:
        facts.config = read_mapping(folder / "config.json")
    except FileNotFoundError:
        facts.problems.append(f"source.model = {str(folder)!r} holds no config.json: not a Hugging Face directory.")
    except UserError as error:
        facts.problems += error.problems
    try:
        _read_tokenizer(facts, folder, boundary_token)
    except UserError as error:
        facts.problems += error.problems


def _read_tokenizer(facts: SourceFacts, folder: Path, boundary_token: str) -> None:
    """The tokenizer's vocabulary and boundary token, from its files. Raises UserError where one cannot be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        if not (folder / "tokenizer.model").is_file():
            facts.problems.append(
                f"source.model = {str(folder)!r} holds neither tokenizer.json nor tokenizer.model; copy its tokenizer "
                "there."
            )
        return
    ids = token_ids(file)
    facts.tokenizer_vocabulary = max(ids.values(), default=-1) + 1
    token = _special_token(folder, f"{boundary_token}_token")
    if token is None:
        other = {"eos": "bos", "bos": "eos"}[boundary_token]
        facts.problems.append(
            f"corpus.boundary_token = {boundary_token}, but the tokenizer in {folder} names no {boundary_token}_token, "
            f"which stands between documents. Set corpus.boundary_token={other} if it has that, or add one to its "
            "tokenizer_config.json."
        )
    elif token not in ids:
        facts.problems.append(
            f"the {boundary_token}_token {token!r} of the tokenizer in {folder} is not in its vocabulary; correct its "
            "tokenizer_config.json."
        )


def token_ids(file: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included. Raises UserError where it is none."""
    tokenizer = read_mapping(file)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    # A unigram model lists [piece, score] pairs by id; the others map piece -> id.
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {pair[0]: i for i, pair in enumerate(vocabulary)}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def _special_token(folder: Path, name: str) -> str | None:
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.is_file():
            value = read_mapping(file).get(name)
            if value is not None:
                return str(value["content"]) if isinstance(value, dict) else str(value)
    return None


def _read_config(facts: SourceFacts, recipe: Recipe) -> None:
    assert facts.config is not None
    config = facts.config
    try:
        facts.family, facts.shape = family_of(config), shape_of(config)
    except UserError as error:
        facts.problems += error.problems
        return
    facts.problems += check_config(config) if recipe.slicing is None else []  # which checks the same and more
    rows = vocabulary_of(config)
    if facts.tokenizer_vocabulary is not None and facts.tokenizer_vocabulary > rows:
        facts.problems.append(
            f"the tokenizer of the source model has ids up to {facts.tokenizer_vocabulary - 1:,}, but its embedding "
            f"holds {rows:,} rows (vocab_size in config.json); use the tokenizer that the model was trained with."
        )
    positions = config.get("max_position_embeddings")
    if positions is not None and recipe.corpus.sequence_tokens > positions:
        facts.problems.append(
            f"corpus.sequence_tokens = {recipe.corpus.sequence_tokens:,} is longer than the source model reads "
            f"(max_position_embeddings = {positions:,}). Set corpus.sequence_tokens={positions}."
        )
    scored = recipe.scores.prompt_tokens + recipe.scores.decode_tokens
    if positions is not None and scored > positions:
        facts.problems.append(
            f"scores.prompt_tokens = {recipe.scores.prompt_tokens:,} and scores.decode_tokens = "
            f"{recipe.scores.decode_tokens:,} need {scored:,} positions; the source model has {positions:,}. "
            f"Set scores.prompt_tokens={max(1, positions - recipe.scores.decode_tokens)} or lower."
        )
    if recipe.pruning is not None:
        wrong = check_pruning(facts.family, facts.shape, recipe.pruning, source_config=config)
        facts.problems += wrong
        if not wrong:
            facts.target = target_shape(facts.shape, recipe.pruning.target)
    if recipe.slicing is not None:
        wrong = check_slicing(config, recipe.slicing)
        facts.problems += wrong
        if not wrong:
            facts.sliced = sliced_config(config, recipe.slicing)
    if recipe.sparsifying is not None:
        facts.target = facts.shape


def result_parameters(recipe: Recipe, source_config: dict[str, Any]) -> int:
    """Parameters of the model that a run makes out of the source, for a recipe that preflight let through."""
    if recipe.pruning is not None:
        return target_parameters(source_config, recipe.pruning.target)
    return (
        count_parameters(source_config) if recipe.slicing is None else sliced_parameters(source_config, recipe.slicing)
    )
