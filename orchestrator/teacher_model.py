"""What is known of the teacher of a recipe's distillation, read without torch or transformers."""

from pathlib import Path

from orchestrator.model_files import read_mapping, weight_problems
from orchestrator.recipe import Recipe
from orchestrator.source_model import SourceFacts, token_ids
from shearing.errors import UserError
from shearing.models.family import shape_of, vocabulary_of
from shearing.models.parameters import count_parameters

KEY = "recovery.distillation.teacher"


def teacher_problems(recipe: Recipe, source: SourceFacts) -> list[str]:
    """Everything that keeps a teacher from teaching; nothing where the source teaches, or nobody."""
    distillation = recipe.recovery.distillation if recipe.recovery is not None else None
    if distillation is None or distillation.teacher is None:
        return []
    folder = Path(distillation.teacher).expanduser()
    if not (folder / "config.json").is_file():
        return [
            f"{KEY} = {str(folder)!r} is no Hugging Face directory: it holds no config.json (looked from "
            f"{Path.cwd()}). Name one, or set {KEY}=null for the source model."
        ]
    problems = weight_problems(folder, KEY)
    try:
        config = read_mapping(folder / "config.json")
    except UserError as error:
        return problems + error.problems
    teachers, students = vocabulary_of(config), vocabulary_of(source.config) if source.config else None
    if students is not None and teachers != students:
        problems.append(
            f"{KEY} = {str(folder)!r} has a vocabulary of {teachers:,}, the source of {students:,}; both have to be "
            f"one, since distributions over tokens are compared. Set {KEY} to a model with the source's tokenizer, or "
            "to null."
        )
    elif recipe.source.model is not None and source.tokenizer_vocabulary is not None:
        problems += _tokenizer_problems(folder, Path(recipe.source.model).expanduser())
    positions = config.get("max_position_embeddings")
    if positions is not None and recipe.corpus.sequence_tokens > positions:
        problems.append(
            f"corpus.sequence_tokens = {recipe.corpus.sequence_tokens:,} is longer than the teacher in {folder} reads "
            f"(max_position_embeddings = {positions:,}). Set corpus.sequence_tokens={positions}."
        )
    return problems


def teacher_parameters(recipe: Recipe, source: SourceFacts) -> int:
    """Parameters of the teacher, 0 without one; from the bytes of its weights where its family is not known here."""
    distillation = recipe.recovery.distillation if recipe.recovery is not None else None
    if distillation is None:
        return 0
    if distillation.teacher is None:
        known = source.config is not None and source.shape is not None
        return count_parameters(source.config, source.shape) if known else 0
    folder = Path(distillation.teacher).expanduser()
    try:
        config = read_mapping(folder / "config.json")
    except (OSError, UserError):  # among the problems
        return 0
    try:
        return count_parameters(config, shape_of(config))
    except UserError:
        stored = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) // stored


def _tokenizer_problems(teacher: Path, source: Path) -> list[str]:
    files = [folder / "tokenizer.json" for folder in (teacher, source)]
    if not all(file.is_file() for file in files):
        return []
    try:
        teachers, students = map(token_ids, files)
    except UserError as error:
        return error.problems
    other = [token for token, number in students.items() if teachers.get(token) != number]
    if not other:
        return []
    return [
        f"{KEY} = {str(teacher)!r} has another tokenizer than the source: {len(other):,} of the source's "
        f"{len(students):,} tokens have another id or none, {other[0]!r} for one. Set {KEY} to a model with the "
        "source's tokenizer, or to null."
    ]
