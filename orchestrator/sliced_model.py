"""What slicing will make of a source model, from its config alone: sizes, parameters, problems, words."""

from math import prod
from typing import Any

from shearing.models.family import SLICED, shape_of
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import halves_of, shared_size, signal_sizes


def kept_sizes(config: dict[str, Any], slicing: SlicingConfig) -> list[int]:
    """Dimensions that stay of every signal of a source model, in the order of the model."""
    if slicing.rotation == "per_signal":
        return signal_sizes(config, slicing)
    return [shared_size(config, slicing)] * (1 + shape_of(config).num_layers * len(halves_of(config)))


def residual_parameters(sliced_config: dict[str, Any]) -> int:
    """Parameters of the matrices that turn the residual stream of a sliced model; none in a plain one."""
    layers = sliced_config[SLICED]["layers"] if SLICED in sliced_config else []
    return sum(prod(size) for layer in layers for size in layer["residuals"].values())


def slicing_in_words(slicing: SlicingConfig) -> str:
    """What a run does, in one line."""
    rotation = {
        "per_signal": "one rotation a signal, with a matrix between every two",
        "shared": "one rotation for all signals, which leaves a plain model",
    }[slicing.rotation]
    orientation = {"pca": "principal directions", "random": f"turned at random (seed {slicing.seed})"}
    text = f"{slicing.calibration.sequences:,} sequences of calibration text"
    return f"{rotation}; {orientation[slicing.orientation]}; on {text}, each layer on what slicing left of those before"


def kept_in_words(config: dict[str, Any], slicing: SlicingConfig) -> str:
    """Signals and their sizes in one line: `4 of 128 -> 96, then 1 of 128 -> 128`."""
    whole, runs = shape_of(config).hidden_size, list[list[int]]()
    for size in kept_sizes(config, slicing):
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return ", then ".join(f"{count} of {whole:,} -> {size:,}" for count, size in runs)
