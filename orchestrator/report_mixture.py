"""What a report says of the mixture, a teacher and adapters: in words, at what cost, and whether decisions replay."""

from typing import Any

from pydantic import ValidationError

from orchestrator.report_reading import PhaseRecord, RunRecord
from orchestrator.settings_in_words import distillation_in_words, lora_in_words, mixture_in_words
from shearing.data.config import MixtureConfig
from shearing.data.mixture import MixtureState, replay
from shearing.errors import UserError
from shearing.training.config import DistillationConfig, LoraConfig


def settings(run: RunRecord) -> dict[str, str]:
    """The recipe's mixture, the loss that moved it, its teacher and adapters, in words; empty where it has none."""
    config, recovery = _mixture_of(run), run.recipe.get("recovery") or {}
    taught, lora = recovery.get("distillation"), recovery.get("lora")
    return {
        "mixture": mixture_in_words(config) if config else "",
        "loss_from": config.loss_from if config else "",
        "distillation": distillation_in_words(DistillationConfig.model_validate(taught)) if taught else "",
        "lora": lora_in_words(LoraConfig.model_validate(lora)) if lora else "",
    }


def replays(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Phase -> whether its decisions come out again from their recorded losses.

    With `versions`, `differs_at` (None where all are equal) and `how`; `problem` instead where they cannot be replayed.
    """
    config = _mixture_of(run)
    domains = (run.recipe.get("corpus") or {}).get("domains") or {}
    prior: dict[str, Any] = {name: (domain or {}).get("proportion") for name, domain in domains.items()}
    if config is None or not prior or None in prior.values():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for phase, decisions in run.mixture.items():
        try:
            states = [MixtureState.model_validate(decision["state"]) for decision in decisions]
            result = replay(states, config.unsteered() if phase == "source" else config, prior)
            found[phase] = {"versions": result.versions, "differs_at": result.differs_at, "how": result.how}
        except UserError as error:
            found[phase] = {"problem": str(error)}
        except (ValidationError, KeyError, AssertionError) as error:
            found[phase] = {"problem": f"{type(error).__name__}: {error}"}
    return found


def evaluation_cost(record: PhaseRecord) -> dict[str, float | None]:
    """Seconds that a phase spent in held-out evaluation, and their share of all its steps and evaluations."""
    seconds = sum(row.get("seconds") or 0.0 for row in record.evaluations)
    whole = seconds + sum(row.get("step_s") or 0.0 for row in record.steps)
    return {"evaluation_s": seconds, "evaluation_share": seconds / whole if whole else None}


def _mixture_of(run: RunRecord) -> MixtureConfig | None:
    try:
        return MixtureConfig.model_validate(run.recipe.get("mixture") or {}) if run.recipe else None
    except ValidationError:
        return None
