"""Everything that can be wrong with a recipe and is known before anything starts, all at once.

Loads neither torch nor Ray nor transformers.
"""

import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path

from orchestrator.data_forecast import DomainUse, Supply, data_use, estimated_supply, find_text, known_supply, phases_of
from orchestrator.named_files import replaced_inputs
from orchestrator.recipe import Recipe
from orchestrator.run import stages_of
from orchestrator.source_model import SourceFacts, inspect_source, result_parameters
from orchestrator.stage import recipe_conflicts
from orchestrator.stores import open_named, unreadable
from orchestrator.teacher_model import teacher_problems
from orchestrator.workspace import Workspace, workspace_uri
from shearing.data.references import load_references
from shearing.data.rule_by_path import rule_problem
from shearing.errors import UserError
from shearing.models.parameters import adapter_sizes
from shearing.pruning.config import PruningConfig

PROPORTION_TOLERANCE = 1e-6
ESTIMATE_MARGIN = 2.0  # a forecast from bytes is refused only where it falls short by more than its own error


def preflight(recipe: Recipe) -> list[str]:
    """Every problem of a recipe, each a complete message; an empty list where a run may start."""
    text_bytes, problems = find_text(recipe)
    problems += _proportion_problems(recipe)
    facts = inspect_source(recipe)
    problems += facts.problems
    problems += teacher_problems(recipe, facts)
    problems += _lora_problems(recipe, facts)
    problems += _schedule_problems(recipe)
    problems += _reference_problems(recipe, facts)
    problems += _mixture_problems(recipe)
    problems += _tracker_problems(recipe)
    folder_problems, workspace = _folder_problems(recipe)
    problems += folder_problems
    if workspace is not None:
        problems += replaced_inputs(recipe, workspace.store)
        try:
            problems += recipe_conflicts(stages_of(recipe), recipe, workspace)
            problems += _supply_problems(recipe, supply_of(recipe, workspace, text_bytes, facts))
        except OSError as error:  # the corpus' folder is looked into as well
            problems.append(unreadable("workspace", workspace_uri(recipe), error))
    return problems


def supply_of(recipe: Recipe, workspace: Workspace, text_bytes: dict[str, float], facts: SourceFacts) -> Supply:
    """Sequences of every domain: from the manifest where the corpus is prepared, else estimated from file sizes."""
    known = known_supply(recipe, workspace)
    return known or estimated_supply(recipe, text_bytes, facts.tokenizer_vocabulary)


def _proportion_problems(recipe: Recipe) -> list[str]:
    problems = []
    proportions = {name: domain.proportion for name, domain in recipe.corpus.domains.items()}
    total = math.fsum(proportions.values())
    if proportions and abs(total - 1) > PROPORTION_TOLERANCE:
        scaled = ", ".join(f"{name} {value / total:.6g}" for name, value in proportions.items())
        problems.append(
            f"corpus.domains: the proportions sum to {total:.6g}, not 1 (allowed error {PROPORTION_TOLERANCE:g}). "
            f"Scaled to 1 they are: {scaled}."
        )
    split = recipe.corpus.split
    if split.eval + split.prune >= 1:
        problems.append(
            f"corpus.split: eval {split.eval:g} and prune {split.prune:g} leave nothing to the train split; their sum "
            "has to be below 1. Set corpus.split.prune lower."
        )
    return problems


def _lora_problems(recipe: Recipe, facts: SourceFacts) -> list[str]:
    lora = recipe.recovery.lora if recipe.recovery is not None else None
    if lora is not None and recipe.sparsifying is not None:
        return [
            "recovery.lora is given, and sparsifying too: adapters that are added to weights fill their zeros. Set "
            "recovery.lora=null; recovery then trains every weight that is not 0."
        ]
    if lora is None or facts.result is None:
        return []
    config, shape = facts.result
    narrowest = min(min(size) for size in adapter_sizes(config, lora.targets, shape))
    if lora.rank <= narrowest:
        return []
    return [
        f"recovery.lora.rank = {lora.rank}, but the narrowest linear of {' and '.join(lora.targets)} in the model that "
        f"is recovered has {narrowest} rows or columns, so no change of it has a higher rank; allowed: 1 to "
        f"{narrowest}. Set recovery.lora.rank={narrowest} or lower, or recovery.lora=null to train every weight."
    ]


def _warmup_problems(section: str, warmup_steps: int, phase: str, steps: int) -> list[str]:
    if warmup_steps <= steps:
        return []
    return [
        f"{section}.warmup_steps = {warmup_steps:,} is longer than the phase ({phase}.steps = {steps:,}); allowed: 0 "
        f"to {steps:,}. Set {section}.warmup_steps={max(1, steps // 10)}."
    ]


def _schedule_problems(recipe: Recipe) -> list[str]:
    problems: list[str] = []
    seen: set[str] = set()
    for phase in phases_of(recipe):
        if phase.key in seen:
            continue
        seen.add(phase.key)
        training = phase.training
        problems += _warmup_problems(phase.key, training.warmup_steps, phase.key, training.steps)
        if training.update_mixture_every_steps is not None and recipe.mixture.loss_from == "eval":
            problems.append(
                f"{phase.key}.update_mixture_every_steps = {training.update_mixture_every_steps:,}, but with "
                "mixture.loss_from = eval the mixture moves at each evaluation. Set mixture.loss_from=train, or "
                f"{phase.key}.update_mixture_every_steps=null and {phase.key}.evaluate_every_steps to the cadence."
            )
        problems += _batch_problems(recipe, phase.key, training.global_batch_tokens)
    if recipe.scratch is not None and recipe.scratch.warmup_steps is not None and recipe.recovery is not None:
        problems += _warmup_problems("scratch", recipe.scratch.warmup_steps, "recovery", recipe.recovery.steps)
    return problems + _sparsity_warmup_problems(recipe.pruning)


def _sparsity_warmup_problems(pruning: PruningConfig | None) -> list[str]:
    if pruning is None or pruning.method != "learned" or pruning.gates.sparsity_warmup_steps <= pruning.steps:
        return []
    steps = pruning.steps
    return [
        f"pruning.gates.sparsity_warmup_steps = {pruning.gates.sparsity_warmup_steps:,} is longer than the phase "
        f"(pruning.steps = {steps:,}), so the target would never be asked for; allowed: 0 to {steps:,}. "
        f"Set pruning.gates.sparsity_warmup_steps={max(1, steps // 5)}."
    ]


def _batch_problems(recipe: Recipe, key: str, batch_tokens: int) -> list[str]:
    sequence_tokens, engine = recipe.corpus.sequence_tokens, recipe.engine
    if batch_tokens % sequence_tokens:
        nearest = max(1, round(batch_tokens / sequence_tokens)) * sequence_tokens
        return [
            f"{key}.global_batch_tokens = {batch_tokens:,} is not a multiple of corpus.sequence_tokens = "
            f"{sequence_tokens:,}. Set {key}.global_batch_tokens={nearest}."
        ]
    sequences = batch_tokens // sequence_tokens
    if not isinstance(engine.workers, int):  # whatever their number, it need not divide the batch
        return [
            f"engine.workers.max = {engine.most_workers:,} is more than the {sequences:,} sequences of "
            f"{key}.global_batch_tokens = {batch_tokens:,}, so some would have none. Set "
            f"engine.workers.max={sequences}."
        ] * (engine.most_workers > sequences)
    at_once = engine.workers * engine.micro_batch_sequences
    if sequences % at_once == 0:
        return []
    micro = [m for m in _divisors(sequences) if sequences % (m * engine.workers) == 0]
    workers = [w for w in _divisors(sequences) if sequences % (w * engine.micro_batch_sequences) == 0]
    nearest = max(1, round(sequences / at_once)) * at_once * sequence_tokens
    choices = [f"{key}.global_batch_tokens={nearest}"]
    choices += [f"engine.micro_batch_sequences to one of {_listed(micro)}"] if micro else []
    choices += [f"engine.workers to one of {_listed(workers)}"] if workers else []
    return [
        f"{key}.global_batch_tokens = {batch_tokens:,} is {sequences:,} sequences, which {engine.workers} workers x "
        f"{engine.micro_batch_sequences} sequences of a micro-batch do not divide. Set {' or '.join(choices)}."
    ]


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, min(number, 4096) + 1) if number % value == 0]


def _listed(values: list[int]) -> str:
    shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
    return ", ".join(map(str, shown))


def _reference_problems(recipe: Recipe, facts: SourceFacts) -> list[str]:
    if recipe.references.kind == "source":
        return []
    known = facts.result is not None and facts.config is not None
    parameters = result_parameters(recipe, facts.config) if known and facts.config else 10**9
    try:
        load_references(recipe.references, recipe.corpus.domains, parameters)
    except UserError as error:
        return [f"references: {problem}" for problem in error.problems]
    return []


def _mixture_problems(recipe: Recipe) -> list[str]:
    mixture, count = recipe.mixture, max(1, len(recipe.corpus.domains))
    problems = []
    if mixture.floor * count > 1:
        problems.append(
            f"mixture.floor = {mixture.floor:g} for {count} domains asks for more than the whole; allowed: at most "
            f"{1 / count:.4g}. Set mixture.floor=0."
        )
    if mixture.cap * count < 1:
        problems.append(
            f"mixture.cap = {mixture.cap:g} for {count} domains cannot make up the whole; allowed: at least "
            f"{1 / count:.4g}. Set mixture.cap=1."
        )
    if mixture.is_path and (problem := rule_problem(mixture.rule)):
        problems.append(problem)
    for name, domain in recipe.corpus.domains.items():
        if mixture.rule in ("uniform", "temperature"):
            break  # these start from proportions of their own
        if not mixture.floor <= domain.proportion <= mixture.cap:
            problems.append(
                f"corpus.domains.{name}.proportion = {domain.proportion:g} lies outside mixture.floor = "
                f"{mixture.floor:g} to mixture.cap = {mixture.cap:g}. Widen these or change the proportion."
            )
    return problems


def _tracker_problems(recipe: Recipe) -> list[str]:
    problems = [
        f"trackers names {name}, which is not installed. Run `pip install {name}` on every node, or leave it out."
        for name in recipe.trackers
        if importlib.util.find_spec(name) is None
    ]
    if "tensorboard" in recipe.trackers and "://" in workspace_uri(recipe):
        problems.append(
            f"trackers names tensorboard, which writes into the workspace, and workspace = {recipe.workspace!r} is not "
            "a folder. Allowed beside a URI: wandb, mlflow."
        )
    return problems


def _folder_problems(recipe: Recipe) -> tuple[list[str], Workspace | None]:
    problems = []
    workspace: Workspace | None = None
    for key, uri in (("workspace", workspace_uri(recipe)), ("corpus.path", recipe.corpus.path)):
        try:
            store = open_named(key, uri)
        except UserError as error:
            problems += error.problems
            continue
        if store.is_local and (problem := _unwritable(key, Path(store.path))):
            problems.append(problem)
            continue
        if key == "workspace":
            workspace = Workspace(store)
    return problems, workspace


def _unwritable(key: str, folder: Path) -> str | None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        return f"{key} = {str(folder)!r}: {there} is a file, not a folder. Set {key} to a folder."
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{key} = {str(folder)!r}: {there} cannot be written by this user. Set {key} to a folder that can."
    return None


def _supply_problems(recipe: Recipe, supply: Supply) -> list[str]:
    margin = ESTIMATE_MARGIN if supply.estimated else 1.0
    label = "an estimate from file sizes" if supply.estimated else "the prepared corpus"
    problems = [
        f"domain {name} has {_count(splits.get('eval', 0.0))} sequences in its eval split ({label}); at least one is "
        "needed to measure its loss. Give it more text, set corpus.split.eval higher, or corpus.sequence_tokens lower."
        for name, splits in supply.sequences.items()
        if splits.get("eval", 0.0) * margin < 1
    ]
    if reader := _calibrated(recipe):
        problems += [
            f"domain {name} has {_count(splits.get('prune', 0.0))} sequences in its prune split ({label}), where "
            f"{reader} takes its calibration text from; at least one is needed. Give "
            "it more text, set corpus.split.prune higher, or corpus.sequence_tokens lower."
            for name, splits in supply.sequences.items()
            if splits.get("prune", 0.0) * margin < 1
        ]
    return problems + _exhausted(recipe, data_use(recipe, supply), margin, label)


def _calibrated(recipe: Recipe) -> str | None:
    """What in a recipe reads calibration text, if anything does."""
    if recipe.slicing is not None:
        return "slicing"
    if recipe.sparsifying is not None and recipe.sparsifying.method == "sparsegpt":
        return "sparsifying.method = sparsegpt"
    method = recipe.pruning.method if recipe.pruning is not None else None
    return f"pruning.method = {method}" if method in ("activation", "block_influence") else None


def _exhausted(recipe: Recipe, uses: Iterable[DomainUse], margin: float, label: str) -> list[str]:
    problems = []
    for use in uses:
        short = use.drawn > use.sequences * margin
        if use.sequences * margin < 1:
            higher = ", set corpus.split.prune higher" if use.phase.split == "prune" else ""
            problems.append(
                f"domain {use.domain} has {_count(use.sequences)} sequences in its {use.phase.split} split ({label}), "
                f"where {use.phase.name} draws {use.drawn:,.0f}. Give it more text{higher}, or lower "
                "corpus.sequence_tokens."
            )
        elif short and recipe.mixture.on_exhausted == "stop":
            problems.append(
                f"domain {use.domain} would run out in {use.phase.name}: {use.drawn:,.0f} sequences drawn at its prior "
                f"proportion, {_count(use.sequences)} in its {use.phase.split} split ({label}), and "
                "mixture.on_exhausted = stop. Set mixture.on_exhausted=next_epoch, shorten "
                f"{use.phase.key}.steps, or give it more text."
            )
    return problems


def _count(sequences: float) -> str:
    return f"{sequences:,.0f}" if sequences >= 1 or sequences == 0 else "less than one"
