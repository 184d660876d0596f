"""The pruned model out of what was learned or chosen, and the proof that nothing changed on the way."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shearing.evaluation.held_out import held_out_sequences
from shearing.evaluation.losses import domain_loss_sums, mean_losses
from shearing.models.directories import local_directory
from shearing.models.family import family_of, shape_of
from shearing.models.loading import load_model, new_model, read_config
from shearing.models.parameters import UNEVEN, count_parameters
from shearing.pruning.extraction import extract, kept_units
from shearing.pruning.gates import gates_for
from shearing.pruning.masks import attach_gates
from shearing.pruning.target import target_shape
from shearing.pruning.uneven import extract_uneven, largest_shape
from shearing.storage import open_store
from shearing.training.checkpoint import CheckpointReader
from shearing.training.choosing import read_chosen_gates
from shearing.training.engine import DTYPES
from shearing.training.export import CheckpointTensors, ExportConfig, fill, with_mean, write_directory
from shearing.training.mask_learning import learned_gates

GatesByGroup = Mapping[str, Tensor]


def extract_model(config: ExportConfig) -> dict[str, Any]:
    """Cut the pruned model out of mask learning's last checkpoint, or of the source where units were chosen at once.

    Writes it, and measures three of the four losses. Returns what the stage `extraction` puts out but for the reloaded
    directory's loss, which only a fresh process can measure honestly.
    """
    assert config.pruning is not None
    source = local_directory(config.source)
    model_config, dtype = read_config(source), DTYPES[config.dtype]
    shape = shape_of(model_config)
    target = target_shape(shape, config.pruning.target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    masked: nn.Module = load_model(source, dtype, config.trust_remote_code)
    if config.pruning.method == "learned":
        reader = CheckpointReader(open_store(config.checkpoint))
        tensors: Mapping[str, Tensor] = CheckpointTensors(reader, dtype)
        fill(masked, tensors)
        arrays = {name: torch.from_numpy(value) for name, value in reader.arrays("gates").items()}
        gates = learned_gates(arrays, gates_for(model_config, config.pruning))
        soft, exact = gates.deterministic(exact=False), gates.deterministic(exact=True)
    else:
        tensors = {name: parameter.detach() for name, parameter in masked.named_parameters()}
        soft = exact = read_chosen_gates(open_store(config.checkpoint))
    sequences = held_out_sequences(open_store(config.corpus), config.sequences_per_domain)

    def losses(model: nn.Module) -> dict[str, Any]:
        return with_mean(mean_losses(domain_loss_sums(model, sequences, config.batch_sequences, device)))

    proof, forced = _masked_losses(masked.to(device), losses, soft, exact)
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()} if device != "cpu" else tensors
    del masked

    family = family_of(model_config)
    if not config.pruning.target.is_overall:
        new_config, weights = extract(model_config, family, tensors, exact, target)
        kept = kept_units(exact, shape, target)
    else:
        new_config, weights, kept = extract_uneven(model_config, family, tensors, exact)
        target = largest_shape(new_config)
    extracted = dict(weights)
    small: nn.Module = new_model(new_config, dtype)
    small.to(device)
    fill(small, extracted)
    proof["extracted"] = losses(small)
    write_directory(open_store(config.destination), new_config, extracted.items(), source)
    return {
        "model": config.destination,
        "proof": proof,
        "forced": forced,
        "kept": kept,
        "source_shape": shape.model_dump(),
        "target_shape": target.model_dump(),
        "uneven": new_config.get(UNEVEN, {}).get("layers"),
        "parameters": {"source": count_parameters(model_config), "target": count_parameters(new_config)},
    }


def _masked_losses(
    model: nn.Module, losses: Callable[[nn.Module], dict[str, Any]], learned: GatesByGroup, exact: GatesByGroup
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses with the gates as learned and at the exact target; and for each group what the target forced, and cost."""
    slots = attach_gates(model, family_of(model.config))

    def masked(z: GatesByGroup) -> dict[str, Any]:
        slots.set(z)
        return losses(model)

    at_target = masked(exact)
    as_learned = at_target if learned is exact else masked(learned)
    forced = {
        name: {"units": units, "nats": masked({**learned, name: exact[name]})["mean"] - as_learned["mean"]}
        for name, units in forced_units(learned, exact).items()
    }
    slots.set(None)
    return {"learned": as_learned, "exact_target": at_target}, forced


def forced_units(learned: GatesByGroup, exact: GatesByGroup) -> dict[str, list[int]]:
    """What the exact target changes in gates as learned: units opened (or closed, negative) in each row, by group.

    Groups where nothing changes are left out.
    """
    changes = {
        name: (exact[name].count_nonzero(-1) - learned[name].count_nonzero(-1)).reshape(-1).tolist() for name in exact
    }
    return {name: rows for name, rows in changes.items() if any(rows)}


def describe_forced(group: str, forced: Mapping[str, Any]) -> str:
    """One group's part of `extract_model`'s output `forced`, as a sentence."""
    rows = forced["units"]
    closed, opened = -sum(min(0, units) for units in rows), sum(max(0, units) for units in rows)
    words = [f"{verb} {count:,}" for verb, count in (("closed", closed), ("opened", opened)) if count]
    touched = [f"layer {row}: {units:+d}" for row, units in enumerate(rows) if units]
    where = f" ({', '.join(touched)})" if len(rows) > 1 else ""
    return (
        f"extraction forced the gates of {group!r}: it {' and '.join(words)} more than they had learned{where}, which "
        f"alone cost {forced['nats']:+.4f} nats a token"
    )
