"""Units chosen at once, by `pruning.method` other than `learned`: seconds in place of mask learning."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from shearing.config import Config
from shearing.data.calibration import calibration_tokens
from shearing.models.directories import local_directory
from shearing.models.family import family_of, shape_of
from shearing.models.loading import load_model, read_config
from shearing.pruning.config import PruningConfig
from shearing.pruning.importance import (
    Scores,
    activation_scores,
    choose_units,
    magnitude_scores,
    random_scores,
    removal_scores,
)
from shearing.pruning.target import GroupSpec, pruning_groups
from shearing.storage import Store, open_store
from shearing.training.engine import DTYPES

GATES_NAME = "gates.safetensors"


class ChoosingConfig(Config):
    """What choosing needs; plain values, so that it travels to any node."""

    source: str
    destination: str
    corpus: str
    proportions: dict[str, float]
    batch_sequences: int
    dtype: str
    trust_remote_code: bool = False
    pruning: PruningConfig
    seed: int


def choose_and_write(config: ChoosingConfig) -> dict[str, Any]:
    """Score every unit of the source model, choose at exactly the target's size, and write gates of 0 and 1.

    Returns what extraction reads in place of a checkpoint, in the words of mask learning's outcome: no gate is between.
    """
    began_s = time.perf_counter()
    shape = shape_of(read_config(local_directory(config.source)))
    groups = pruning_groups(shape, config.pruning)
    gates = choose_units(_scores(config, groups), groups)
    store = open_store(config.destination)
    store.write_bytes(GATES_NAME, save({name: gate.contiguous() for name, gate in gates.items()}))
    return {
        "checkpoint": config.destination,
        "gaps": {name: [0.0] * (spec.rows or 1) for name, spec in groups.items()},
        "converged": True,
        "missed": [],
        "seconds": time.perf_counter() - began_s,
    }


def read_chosen_gates(store: Store) -> dict[str, Tensor]:
    """The gates that `choose_and_write` wrote, by group."""
    return load(store.read_bytes(GATES_NAME))


def _scores(config: ChoosingConfig, groups: dict[str, GroupSpec]) -> Scores:
    method = config.pruning.method
    if method == "random":
        return random_scores(groups, config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(local_directory(config.source), DTYPES[config.dtype], config.trust_remote_code)
    model.to(device).eval()
    family, shape = family_of(model.config), shape_of(model.config)
    if method == "magnitude":
        return magnitude_scores(model, family, shape)
    batches = [torch.from_numpy(tokens_NT.astype(np.int64)).to(device) for tokens_NT in calibration_batches(config)]
    scores = activation_scores(model, family, shape, batches)
    if method == "activation" and "layer" in groups:
        scores["layer"] = removal_scores(model, family, shape, batches)
    return scores


def calibration_batches(config: ChoosingConfig) -> Iterator[np.ndarray]:
    """Token ids [N, T] of the calibration text: the prune split, all domains by their proportions."""
    sequences = config.pruning.calibration.sequences
    tokens_NT = calibration_tokens(open_store(config.corpus), config.proportions, sequences, config.seed)
    for start in range(0, len(tokens_NT), config.batch_sequences):
        yield tokens_NT[start : start + config.batch_sequences]
