"""What tests of masks and of extraction share: gates, logits, and a load that fails on any warning."""

import logging
import warnings

import torch
from tiny_models import TOKENS
from transformers import AutoModelForCausalLM

from shearing.models.family import family_of
from shearing.models.loading import model_tensors
from shearing.pruning.extraction import extract
from shearing.pruning.gates import Gates
from shearing.pruning.target import GROUPS, GroupSpec, gate_groups


def random_gates(source, target, seed=0, hard=False):
    """Gates at the target's exact size: random numbers in (0.2, 1), or ones, where open."""
    gates = Gates(gate_groups(source, target), initial_log_alpha=0.0, initial_log_alpha_std=2.0, seed=seed)
    z = gates.deterministic(exact=True)
    return {name: (gate != 0).float() for name, gate in z.items()} if hard else z


def all_groups(shape):
    """Specifications of every group that masks know, those that take half a layer too."""
    half = GroupSpec(shape.num_layers, shape.num_layers)
    return gate_groups(shape, shape, GROUPS) | {"attention_layer": half, "mlp_layer": half}


def outlets(family):
    """Of attention and of MLP: the projection, and the last module before the residual stream."""
    pairs = ((family.output, family.attention_post_norm), (family.down, family.mlp_post_norm))
    return [(name, norm or name) for name, norm in pairs]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def extracted(model, z, target, **options):
    """Config and tensors of the pruned model, as two dicts."""
    config, tensors = extract(model.config, family_of(model.config), dict(model_tensors(model)), z, target, **options)
    return config, dict(tensors)


def load_quietly(folder, caplog, **options):
    """Loads by stock transformers; fails on any warning, logged or raised."""
    stock = logging.getLogger("transformers")
    stock.addHandler(caplog.handler)
    caplog.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        stock.removeHandler(caplog.handler)
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not logged
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
