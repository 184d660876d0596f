"""The runs of the study: what each starts from, and what it changes in the recipe that all share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.recipe import Recipe
from shearing.models.family import llama_config
from shearing.models.parameters import count_parameters
from shearing.pruning.target import target_shape

Kind = Literal["source", "prune", "train", "speed"]

RESULT = "result.json"
"""In the folder of each task that is done."""

CLAIMS = ("scratch", "mixture", "budget", "cofi", "method", "distillation", "loss_from")
SCRATCH_MULTIPLES = (1, 2, 4, 8)
SCRATCH_WARMUP_STEPS = 100
"""At most, else a fifth of all steps: with recovery's ten, 300 steps ended at 4.89 nats a token in place of 4.22."""

RULES = ("uniform", "temperature", "sheared", "sheared_unclipped", "dro", "exp3")  # and static, which claim 1 trains
METHODS = ("magnitude", "activation", "block_influence", "random")
DISTILLATION_WEIGHTS = (0.5, 1.0)
BUDGET_SHARES = (0.15, 0.3, 0.5, 0.7)
"""Of all steps, those that go to mask learning."""


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        name: Its folder below the study's.
        kind: `source` trains the model that all others start from; `prune` chooses and extracts; `train` recovers a
            pruned model or trains its shape from nothing; `speed` measures models side by side.
        models: Names of the tasks whose models it takes; for `train` exactly one.
        overrides: Of the shared recipe.
        fresh: The model's shape alone, with new weights.
    """

    name: str
    kind: Kind
    models: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True)
class Budget:
    """Steps of the shared recipe that tasks are made from, and its target."""

    pruning_steps: int
    recovery_steps: int
    parameters: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Budget":
        """What a recipe says; `parameters` are the target shape's, all counted, which CoFi is asked for."""
        assert recipe.source.train is not None
        source = recipe.source.train.shape
        config = llama_config(source, recipe.source.train.tokenizer.vocab_size, 2 * recipe.corpus.sequence_tokens)
        parameters = count_parameters(config, target_shape(source, recipe.pruning.target))
        return cls(recipe.pruning.steps, recipe.recovery.steps, parameters)


SOURCE = Task("source", "source")


def study_tasks(claims: Iterable[str], seeds: Iterable[int], budget: Budget) -> list[Task]:
    """Every task of the claims asked for, once each, those that others start from first."""
    tasks = {SOURCE.name: SOURCE}
    for seed in seeds:
        for claim in claims:
            for task in _TASKS_OF[claim](seed, budget):
                tasks.setdefault(task.name, task)
    order = {"source": 0, "prune": 1, "train": 2, "speed": 3}
    return sorted(tasks.values(), key=lambda task: (order[task.kind], -_steps(task, budget), task.name))


def _steps(task: Task, budget: Budget) -> int:
    """How long a task is: long ones begin first, so that none runs alone at the end."""
    asked = [value for key, _, value in (text.partition("=") for text in task.overrides) if key == "recovery.steps"]
    return int(asked[0]) if asked else budget.recovery_steps


def _seeded(seed: int, *overrides: str) -> tuple[str, ...]:
    return (f"seed={seed}", *overrides)


def _learned(seed: int) -> Task:
    return Task(f"prune/learned-{seed}", "prune", (SOURCE.name,), _seeded(seed))


def _recovered(pruned: Task, name: str, seed: int, *overrides: str) -> Task:
    return Task(f"train/{name}-{seed}", "train", (pruned.name,), _seeded(seed, *overrides))


def _base(seed: int) -> list[Task]:
    """Learned masks, and their recovery on the static mixture: one side of most comparisons."""
    pruned = _learned(seed)
    return [pruned, _recovered(pruned, "static", seed)]


def _scratch(seed: int, budget: Budget) -> list[Task]:
    fresh = [
        Task(
            f"train/scratch-{multiple}x-{seed}",
            "train",
            (_learned(seed).name,),
            _seeded(
                seed,
                f"recovery.steps={budget.recovery_steps * multiple}",
                f"scratch.warmup_steps={min(budget.recovery_steps * multiple // 5, SCRATCH_WARMUP_STEPS)}",
                f"recovery.evaluate_every_steps={15 * multiple}",
            ),
            fresh=True,
        )
        for multiple in SCRATCH_MULTIPLES
    ]
    return [*_base(seed), *fresh]


def _mixture(seed: int, _budget: Budget) -> list[Task]:
    pruned, static = _base(seed)
    return [pruned, static, *(_recovered(pruned, rule, seed, f"mixture.rule={rule}") for rule in RULES)]


def _shared_budget(seed: int, budget: Budget) -> list[Task]:
    total = budget.pruning_steps + budget.recovery_steps
    tasks = []
    for share in BUDGET_SHARES:
        steps = round(share * total)
        name = f"budget-{round(100 * share)}"
        pruned = Task(
            f"prune/{name}-{seed}",
            "prune",
            (SOURCE.name,),
            _seeded(
                seed,
                f"pruning.steps={steps}",
                f"pruning.gates.sparsity_warmup_steps={steps // 4}",
                "pruning.gates.extra_steps=0",
            ),
        )
        tasks += [pruned, _recovered(pruned, name, seed, f"recovery.steps={total - steps}")]
    return tasks


def _cofi(seed: int, budget: Budget) -> list[Task]:
    target = f"pruning.target={{parameters: {budget.parameters}}}"
    pruned = Task(f"prune/cofi-{seed}", "prune", (SOURCE.name,), _seeded(seed, target))
    speed = Task(f"speed/cofi-{seed}", "speed", (SOURCE.name, _learned(seed).name, pruned.name), _seeded(seed))
    return [*_base(seed), pruned, _recovered(pruned, "cofi", seed, target), speed]


def _method(seed: int, _budget: Budget) -> list[Task]:
    tasks = _base(seed)
    for method in METHODS:
        chosen = f"pruning.method={method}"
        pruned = Task(f"prune/{method}-{seed}", "prune", (SOURCE.name,), _seeded(seed, chosen))
        tasks += [pruned, _recovered(pruned, method, seed)]
    return tasks


def _distillation(seed: int, _budget: Budget) -> list[Task]:
    pruned, static = _base(seed)
    taught = [
        _recovered(pruned, f"distilled-{weight:g}", seed, f"recovery.distillation.weight={weight}")
        for weight in DISTILLATION_WEIGHTS
    ]
    return [pruned, static, *taught]


def _loss_from(seed: int, budget: Budget) -> list[Task]:
    pruned, _ = _base(seed)
    by_evaluation = _recovered(pruned, "sheared", seed, "mixture.rule=sheared")
    by_training = _recovered(
        pruned,
        "sheared-train",
        seed,
        "mixture.rule=sheared",
        "mixture.loss_from=train",
        "recovery.update_mixture_every_steps=15",
        f"recovery.evaluate_every_steps={budget.recovery_steps}",
    )
    return [pruned, by_evaluation, by_training]


_TASKS_OF = {
    "scratch": _scratch,
    "mixture": _mixture,
    "budget": _shared_budget,
    "cofi": _cofi,
    "method": _method,
    "distillation": _distillation,
    "loss_from": _loss_from,
}
