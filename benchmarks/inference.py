"""How fast smaller models answer: prefill and decoding of one model made smaller in several ways, at equal parameters.

    python benchmarks/inference.py [--sizes 1M 6M 25M] [--rounds N] [--threads N] [--prompt N] [--decode N]

Weights are random, which changes no time. All forms of a model take turns within every round of one process, in an
order that is turned round each time, so that each ratio compares neighbours in time; medians over rounds with
quartiles, tokens a second with a key-value cache as multiples of the dense model's. Forms:

    dense     the source
    again     a second dense model: its ratio is the noise
    sheared   a plain model with three quarters of every dimension of the source
    sliced    one rotation a signal, residual matrices between them; as many parameters as the sheared, at most
    shared    one rotation for all: a plain model with a narrower residual stream
    2:4       dense shapes, half of each matrix zero, stored and multiplied as dense; torch's semi-structured kernels
              take its place where the device has them (in 16 bits), which the line below the table says
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from shearing.errors import UserError
from shearing.evaluation.throughput import Load, answer, parameter_count
from shearing.models.family import llama_config
from shearing.models.loading import new_model
from shearing.models.parameters import count_parameters
from shearing.models.shape import Shape
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import check_slicing, sliced_config, sliced_parameters
from shearing.pruning.sparsity.semi_structured import use_semi_structured
from shearing.pruning.sparsity.sparsegpt import TWO_OF_FOUR, magnitude

VOCABULARY = 2048
SIZES = {"1M": (128, 8, 4, 344), "6M": (256, 8, 8, 688), "25M": (512, 8, 8, 1376), "120M": (1024, 16, 10, 2752)}
KEPT = 0.75
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def shape_of_size(name: str, kept: float = 1.0) -> Shape:
    hidden, heads, layers, intermediate = SIZES[name]
    return Shape(
        num_layers=round(layers * kept),
        hidden_size=round(hidden * kept),
        num_heads=round(heads * kept),
        num_kv_heads=round(heads * kept),
        head_size=hidden // heads,
        intermediate_size=round(intermediate * kept / 8) * 8,
    )


def sliced_to(config: Any, rotation: Literal["per_signal", "shared"], parameters: int) -> dict[str, Any]:
    """The config of a sliced model with so many parameters at most."""
    for size in range(config["hidden_size"], 0, -8):
        asked = SlicingConfig(hidden_size=size, rotation=rotation)
        if not check_slicing(config, asked) and sliced_parameters(config, asked) <= parameters:
            return sliced_config(config, asked)
    raise ValueError(f"no slicing leaves {parameters} parameters")


def forms(size: str, positions: int, device: str) -> tuple[dict[str, nn.Module], str]:
    """Every form of a model by its name, and what is to be said of 2:4."""
    dense = llama_config(shape_of_size(size), VOCABULARY, positions)
    sheared = llama_config(shape_of_size(size, KEPT), VOCABULARY, positions)
    most = count_parameters(sheared)
    configs = {
        "dense": dense,
        "again": dense,
        "sheared": sheared,
        "sliced": sliced_to(dense, "per_signal", most),
        "shared": sliced_to(dense, "shared", most),
        "2:4": dense,
    }
    models: dict[str, nn.Module] = {}
    for name, config in configs.items():
        model = new_model(config, DTYPES[device]).to(device).eval()
        with torch.no_grad():  # residual matrices begin as they may
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        models[name] = model
    return models, two_of_four(models["2:4"])


def two_of_four(model: Any) -> str:
    """Zeros in a model's linear layers, and its semi-structured kernels where the device has them; what was done."""
    with torch.no_grad():
        for module in model.get_submodule("model.layers").modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(magnitude(module.weight, TWO_OF_FOUR))
    try:
        return f"2:4 by semi-structured kernels in {len(use_semi_structured(model))} linear layers"
    except UserError as error:
        return f"2:4 is multiplied as dense: {error.problems[0]}"


def rounds_of(models: Mapping[str, nn.Module], load: Load, device: str, rounds: int) -> dict[str, list[Any]]:
    """Seconds of prefill and decoding, a pair a round, by model; one more round before them is thrown away."""
    seconds: dict[str, list[Any]] = {name: [] for name in models}
    for number in range(-1, rounds):
        names = list(models) if number % 2 else list(reversed(list(models)))
        taken = {name: answer(models[name], load, device) for name in names}
        if number >= 0:
            for name, pair in taken.items():
                seconds[name].append(pair)
    return seconds


def shown(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"x{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1M", "6M", "25M"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens read")
    parser.add_argument("--decode", type=int, default=32, help="tokens written")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = Load(options.prompt, options.decode, options.batch)
    print(f"{device}, {DTYPES[device]}, {options.threads} threads; {load}; {options.rounds} rounds")
    print(
        f"{'size':>5} {'form':<8} {'parameters':>12} {'prefill tok/s':>14} {'decode tok/s':>13}  as multiples of dense"
    )
    for size in options.sizes:
        models, said = forms(size, options.prompt + options.decode, device)
        seconds = rounds_of(models, load, device, options.rounds)
        for name, pairs in seconds.items():
            speeds, ratios = [], []
            for kind, tokens in ((0, options.prompt * options.batch), (1, options.decode * options.batch)):
                speeds.append(tokens / statistics.median(pair[kind] for pair in pairs))
                dense = seconds["dense"]
                ratios.append(shown([other[kind] / pair[kind] for pair, other in zip(pairs, dense, strict=True)]))
            count = parameter_count(models[name])
            print(f"{size:>5} {name:<8} {count:>12,} {speeds[0]:>14,.0f} {speeds[1]:>13,.0f}  {', '.join(ratios)}")
        print(f"      {said}")


if __name__ == "__main__":
    main()
