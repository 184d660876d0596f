"""Whether a model in memory is what the table says of its family: modules, their types, names of weights."""

from torch import nn

from shearing.errors import UserError
from shearing.models.families import Family
from shearing.models.family import check_config, is_tied, shape_of
from shearing.models.parameters import parameter_sizes

MOST_PROBLEMS = 5  # the same in every layer, as a rule


def check_model(model: nn.Module, family: Family) -> None:
    """Compares a loaded causal language model with its family's table; weights may lie elsewhere (ZeRO stage 3).

    Raises:
        UserError: A variant that cannot be pruned, a module that is missing or of another type, or weights that the
            family does not have; every problem at once.
    """
    problems = check_config(model.config)
    if not problems:
        problems = _module_problems(model, family) or _name_problems(model, family)
    if problems:
        raise UserError(problems)


def _module_problems(model: nn.Module, family: Family) -> list[str]:
    norm = "LayerNorm" if family.norm == "layer" else "RMSNorm"
    kinds = {family.embedding: "Embedding", family.final_norm: norm, family.lm_head: "Linear"}
    if family.positions is not None:
        kinds[family.positions] = "Embedding"
    inside = dict.fromkeys((*family.pre_norms, *family.post_norms, *family.head_norms), norm)
    projections = (family.query, family.key, family.value, family.output, family.gate, family.up, family.down)
    inside |= {name: "Linear" for name in projections if name is not None}
    for layer in range(shape_of(model.config).num_layers):
        kinds |= {family.layer_module(layer, name): kind for name, kind in inside.items()}
    modules, problems = dict(model.named_modules()), []
    for name, kind in kinds.items():
        module = modules.get(name)
        if module is None:
            problems.append(_problem(family, f"has no module {name}"))
        elif not _is(module, kind, family):
            problems.append(_problem(family, f"has a {type(module).__name__} at {name}, where a {kind} belongs"))
    return problems[:MOST_PROBLEMS]


def _is(module: nn.Module, kind: str, family: Family) -> bool:
    if kind == "RMSNorm":  # every family has a class of its own
        return kind in type(module).__name__ and hasattr(module, family.norm_epsilon)
    return isinstance(module, {"Linear": nn.Linear, "Embedding": nn.Embedding, "LayerNorm": nn.LayerNorm}[kind])


def _name_problems(model: nn.Module, family: Family) -> list[str]:
    expected, found = set(parameter_sizes(model.config)), {name for name, _ in model.named_parameters()}
    if is_tied(model.config):
        found -= {f"{family.lm_head}.weight"}
    missing, spare = sorted(expected - found), sorted(found - expected)
    problems = []
    if missing:
        problems.append(_problem(family, f"lacks {len(missing)} weights that its config promises: {missing[:3]}"))
    if spare:
        problems.append(_problem(family, f"holds {len(spare)} weights that its family does not have: {spare[:3]}"))
    return problems


def _problem(family: Family, what: str) -> str:
    return (
        f"The source model says that it is of the family {family.model_type}, but it {what}. Merge adapters into the "
        "weights and load it with stock transformers, or describe this variant in shearing/models/families.py as "
        "docs/ADDING_A_FAMILY.md tells."
    )
