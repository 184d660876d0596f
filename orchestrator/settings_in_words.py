"""Settings of a recipe as a person would say them, for the plan and the report."""

from orchestrator.recipe import SourceConfig
from shearing.data.config import STILL_RULES, MixtureConfig
from shearing.training.config import DistillationConfig, LoraConfig

_RULES = {
    "static": "held at the prior",
    "uniform": "equal shares, never moved",
    "sheared": "sheared: times exp(loss above the reference), never below 1",
    "sheared_unclipped": "sheared_unclipped: times exp(loss - reference)",
    "exp3": "exp3: a bandit whose reward is the loss; equal shares at first",
}
_LOSSES = {
    "eval": "moved by held-out losses at each evaluation",
    "train": "moved by the losses of training batches, gathered since the last update",
}


def mixture_in_words(mixture: MixtureConfig) -> str:
    """Rule, loss and bounds in one line."""
    parts = [_rule(mixture)]
    if mixture.rule not in STILL_RULES:
        parts.append(_LOSSES[mixture.loss_from])
    if mixture.floor > 0:
        parts.append(f"no share below {mixture.floor:g}")
    if mixture.cap < 1:
        parts.append(f"none above {mixture.cap:g}")
    if mixture.prior_pull > 0:
        parts.append(f"pulled {100 * mixture.prior_pull:g} % of the way to the prior at each update")
    return "; ".join(parts)


def _rule(mixture: MixtureConfig) -> str:
    if mixture.rule == "temperature":
        return f"the prior to the power of 1/{mixture.temperature:g}, never moved"
    if mixture.rule == "dro":
        return f"dro: the worst mixture within a chi-square ball of radius {mixture.dro.rho:g} around a slow centre"
    if mixture.is_path:
        return f"{mixture.rule}: a Python function, imported and run on the cluster, never by --plan"
    return _RULES[mixture.rule]


def distillation_in_words(distillation: DistillationConfig | None) -> str:
    """Weights, temperature and teacher in one line."""
    if distillation is None:
        return "none: continued pretraining learns from the text alone"
    text, taught = 1 - distillation.weight, distillation.weight
    teacher = distillation.teacher or "the source model"
    return (
        f"{text:g} cross-entropy + {taught:g} KL to {teacher} at temperature {distillation.temperature:g}, in "
        "continued pretraining; the teacher stands whole on every worker"
    )


def lora_in_words(lora: LoraConfig | None) -> str:
    """What continued pretraining trains, in one line."""
    if lora is None:
        return "none: continued pretraining trains every weight"
    result = "added to the weights at the end" if lora.merge else "kept as files beside the weights"
    where = f"on every linear of {' and '.join(lora.targets)}"
    return (
        f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g} {where}; "
        f"learning rate {lora.learning_rate:g}; {result}"
    )


def source_in_words(source: SourceConfig) -> str:
    """Where the model to start from comes from."""
    if source.model is not None:
        return f"what lies in {source.model}"
    return "trained by this run; source.model=DIR source.train=null starts from one that is there"
