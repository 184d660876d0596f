"""How many sequences each domain has and how many each phase draws, known or estimated before a run."""

from dataclasses import dataclass

from orchestrator.recipe import Recipe
from orchestrator.workspace import Workspace
from shearing.data.installed_text import is_installed_text, parse_installed_text
from shearing.data.manifest import Split, load_manifest
from shearing.data.mixture import initial_state
from shearing.data.raw_files import list_domains
from shearing.errors import UserError
from shearing.storage import open_store
from shearing.training.config import TrainingConfig

# Usual for text in European languages and code; a vocabulary learned on little text makes shorter tokens.
BYTES_PER_TOKEN = 4.0
BYTES_PER_TOKEN_SMALL_VOCABULARY = 3.0
SMALL_VOCABULARY = 16_384
# What a stored byte is worth as text.
EXPANSION = {"jsonl": 1.0, "txt": 1.0, "parquet": 2.0, "jsonl.gz": 3.0, "jsonl.zst": 3.0}


@dataclass(frozen=True)
class Phase:
    """One phase of training as data use sees it."""

    name: str
    key: str
    split: Split
    training: TrainingConfig


@dataclass(frozen=True)
class Supply:
    """Sequences by domain and split; `estimated` where they come from file sizes and not from a manifest."""

    sequences: dict[str, dict[Split, float]]
    estimated: bool


@dataclass(frozen=True)
class DomainUse:
    """What a phase draws from a domain at the prior proportions, in sequences."""

    phase: Phase
    domain: str
    drawn: float
    sequences: float

    @property
    def epochs(self) -> float:
        """How many times the phase goes through the domain."""
        return self.drawn / self.sequences if self.sequences else float("inf")


def phases_of(recipe: Recipe) -> list[Phase]:
    """The training phases that a recipe asks for, in order; units that are not learned need none."""
    phases = []
    if recipe.source.train is not None:
        phases.append(Phase("source", "source.train", "train", recipe.source.train))
    if recipe.pruning is not None and recipe.pruning.method == "learned":
        phases.append(Phase("pruning", "pruning", "prune", recipe.pruning))
    if recipe.recovery is not None:
        phases.append(Phase("recovery", "recovery", "train", recipe.recovery))
        if recipe.scratch is not None:
            phases.append(Phase("scratch", "recovery", "train", recipe.recovery))
    return phases


def known_supply(recipe: Recipe, workspace: Workspace) -> Supply | None:
    """The sequences of the corpus that this workspace prepared, or None where it has not, or for other text."""
    mark = workspace.mark("corpus")
    if mark is None or mark.finished is None:
        return None
    try:
        manifest = load_manifest(open_store(mark.outputs["path"]))
    except FileNotFoundError:
        return None
    if (
        manifest.domains.keys() != recipe.corpus.domains.keys()
        or manifest.sequence_tokens != recipe.corpus.sequence_tokens
    ):
        return None
    counts = {
        domain: {split: float(entry.sequences) for split, entry in splits.items()}
        for domain, splits in manifest.domains.items()
    }
    return Supply(counts, estimated=False)


def find_text(recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """Bytes of text of every domain that has some, compressed files as usually unpacked; and all problems."""
    found: dict[str, float] = {}
    problems: list[str] = []
    if not recipe.corpus.domains:
        problems.append("corpus.domains is empty; name at least one domain with its text and proportion.")
    for name, domain in recipe.corpus.domains.items():
        texts = [domain.text] if isinstance(domain.text, str) else domain.text
        installed = [text for text in texts if is_installed_text(text)]
        files = [text for text in texts if text not in installed]
        try:
            text_bytes = float(sum(parse_installed_text(text)[1] for text in installed))
            if files or not installed:
                alone = {name: domain.model_copy(update={"text": files})}
                listed = list_domains(recipe.corpus.model_copy(update={"domains": alone}))[name]
                text_bytes += sum(file.file_bytes * EXPANSION[file.kind] for file in listed)
        except UserError as error:
            where = f"corpus.domains.{name}.text: "
            problems += [text if text.startswith("corpus.domains") else where + text for text in error.problems]
            continue
        found[name] = text_bytes
    return found, problems


def estimated_supply(recipe: Recipe, text_bytes: dict[str, float], vocabulary: int | None) -> Supply:
    """Sequences forecast from file sizes: good to a factor of two, since nothing has been tokenised."""
    small = vocabulary is not None and vocabulary < SMALL_VOCABULARY
    bytes_per_token = BYTES_PER_TOKEN_SMALL_VOCABULARY if small else BYTES_PER_TOKEN
    split = recipe.corpus.split
    shares: dict[Split, float] = {"eval": split.eval, "prune": split.prune, "train": 1 - split.eval - split.prune}
    counts: dict[str, dict[Split, float]] = {}
    for domain, size in text_bytes.items():
        whole = size / bytes_per_token / recipe.corpus.sequence_tokens
        counts[domain] = {name: whole * share for name, share in shares.items()}
    return Supply(counts, estimated=True)


def data_use(recipe: Recipe, supply: Supply) -> list[DomainUse]:
    """What every phase draws from every domain at the proportions it starts with (an adaptive mixture moves them).

    Extra steps of mask learning count: whether they are needed is known at its end.
    """
    uses = []
    shares = _first_proportions(recipe)
    for phase in phases_of(recipe):
        drawn = phase.training.most_steps * phase.training.global_batch_tokens / recipe.corpus.sequence_tokens
        for name, share in shares.items():
            if name in supply.sequences:
                uses.append(DomainUse(phase, name, drawn * share, supply.sequences[name].get(phase.split, 0.0)))
    return uses


def _first_proportions(recipe: Recipe) -> dict[str, float]:
    prior = {name: domain.proportion for name, domain in recipe.corpus.domains.items()}
    if not prior:
        return {}
    try:
        return initial_state(recipe.mixture, prior).proportions
    except UserError:  # floor and cap leave none, which preflight says
        return prior
