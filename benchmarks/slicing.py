"""What slicing takes: seconds a layer and peak memory, streamed as the project does it and plainly, and how they grow.

    python benchmarks/slicing.py [--layers 4] [--width 128] [--sequences 32] [--tokens 256] [--rounds N] [--threads N]

The plain way is written below: the whole model in memory, all calibration text through each half-layer at once, one
matrix of all activations in float64, its covariance. Both find the same rotations, which is checked, and make the same
weights. Each measurement is a process of its own; sides take turns. Memory is the growth of the process over what it
held before slicing began, imports left out. Rows after the first change one thing: twice the layers, twice the width,
twice the sequences.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearing.models.family import llama_config
from shearing.models.loading import load_model, model_tensors, new_model, write_model_directory
from shearing.models.shape import Shape
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.driver import slice_model
from shearing.pruning.slicing.job import SharesHere
from shearing.pruning.slicing.rotation import DAMPING

VOCABULARY, HEAD_SIZE, BATCH_SEQUENCES = 2048, 16, 8


@dataclass(frozen=True)
class Task:
    layers: int
    width: int
    sequences: int
    tokens: int

    @property
    def kept(self) -> int:
        return self.width * 3 // 4

    def write(self, folder: Path) -> None:
        heads = self.width // HEAD_SIZE
        shape = Shape(
            num_layers=self.layers,
            hidden_size=self.width,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=HEAD_SIZE,
            intermediate_size=self.width * 8 // 3 // 8 * 8,
        )
        config = llama_config(shape, VOCABULARY, self.tokens)
        write_model_directory(folder, config, model_tensors(new_model(config)))

    def text(self) -> Tensor:
        return torch.randint(VOCABULARY, (self.sequences, self.tokens), generator=torch.Generator().manual_seed(3))


def plain(task: Task, source: Path) -> tuple[list[float], list[float]]:
    """Seconds of each layer, and the share of each signal's squares that is kept."""
    model: Any = load_model(source)
    ids_NT = task.text()
    hidden_NTD = model.model.embed_tokens(ids_NT)
    rotary = model.model.rotary_emb(hidden_NTD, torch.arange(task.tokens)[None])
    seconds, kept, made = [], [], {}
    basis_DK = _basis(hidden_NTD, task.kept, kept)
    made["embedding"] = model.model.embed_tokens.weight.double() @ basis_DK
    for number, layer in enumerate(model.model.layers):
        began_s = time.perf_counter()
        for half, norm, block in (
            ("attention", layer.input_layernorm, layer.self_attn),
            ("mlp", layer.post_attention_layernorm, layer.mlp),
        ):
            basis = basis_DK.float()
            hidden_NTD = hidden_NTD @ basis @ basis.T
            normed_NTD = norm(hidden_NTD)
            if half == "attention":
                added_NTD = block(normed_NTD, position_embeddings=rotary, attention_mask=None)[0]
            else:
                added_NTD = block(normed_NTD)
            hidden_NTD = hidden_NTD + added_NTD
            last = half == "mlp" and number + 1 == task.layers  # of full size where the head is not sliced
            after_DK = torch.eye(task.width).double() if last else _basis(hidden_NTD, task.kept, kept)
            for name, linear in block.named_children():
                if not isinstance(linear, torch.nn.Linear):
                    continue
                weight = linear.weight.double()
                writes = name in ("o_proj", "down_proj")
                made[f"{number}.{name}"] = after_DK.T @ weight if writes else (weight * norm.weight.double()) @ basis_DK
            made[f"{number}.{half}.residual"] = basis_DK.T @ after_DK
            basis_DK = after_DK
        seconds.append(time.perf_counter() - began_s)
    return seconds, kept


def _basis(hidden_NTD: Tensor, size: int, kept: list[float]) -> Tensor:
    x_SD = torch.cat(list(hidden_NTD)).double()
    covariance_DD = x_SD.T @ x_SD
    damped = covariance_DD + DAMPING * covariance_DD.diagonal().mean() * torch.eye(len(covariance_DD))
    basis_DK = torch.linalg.eigh(damped).eigenvectors.flip(-1)[:, :size]
    kept.append(float(((x_SD @ basis_DK) ** 2).sum() / covariance_DD.trace()))
    return basis_DK


def streamed(task: Task, source: Path) -> tuple[list[float], list[float]]:
    """The same by the project."""
    seconds, began_s = [], time.perf_counter()

    def finished(_report: Any) -> None:
        nonlocal began_s
        seconds.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()

    share = CalibrationShare(source, task.text(), batch_sequences=BATCH_SEQUENCES)
    with tempfile.TemporaryDirectory() as folder:
        target, work = Path(folder) / "sliced", Path(folder) / "work"
        report = slice_model(
            source, target, work, SlicingConfig(hidden_size=task.kept), SharesHere([share]), on_layer=finished
        )
    return seconds, report.kept_variance[: 2 * task.layers]


SIDES = {"plain": plain, "streamed": streamed}


def measure(side: str, task: Task, source: Path) -> None:
    """In a process of its own: print what one side took."""
    with torch.no_grad():
        with tempfile.TemporaryDirectory() as folder:  # once on next to nothing: what libraries take is not counted
            small = Task(1, 2 * HEAD_SIZE, 1, 8)
            small.write(Path(folder) / "model")
            SIDES[side](small, Path(folder) / "model")
        before = _peak_bytes()
        seconds, kept = SIDES[side](task, source)
    print(json.dumps({"seconds": seconds, "kept": kept, "bytes": _peak_bytes() - before}))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(task: Task, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """What both sides took, in turns. Raises AssertionError where they find different rotations."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        task.write(Path(folder) / "model")
        for number in range(rounds):
            for side in list(SIDES) if number % 2 else reversed(list(SIDES)):
                told = [sys.executable, __file__, "--measure", side, json.dumps(asdict(task)), f"{folder}/model"]
                done = subprocess.run(
                    told,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for one, other in zip(found["plain"][0]["kept"], found["streamed"][0]["kept"], strict=False):
        assert abs(one - other) < 1e-4, f"the sides keep {one} and {other} of one signal"
    return {
        side: {
            "seconds": statistics.median(statistics.median(each["seconds"]) for each in rows),
            "bytes": statistics.median(each["bytes"] for each in rows),
        }
        for side, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, task, source = options.measure
        measure(side, Task(**json.loads(task)), Path(source))
        return
    base = Task(options.layers, options.width, options.sequences, options.tokens)
    tasks = {
        "base": base,
        "layers x2": replace(base, layers=2 * base.layers),
        "width x2": replace(base, width=2 * base.width),
        "sequences x2": replace(base, sequences=2 * base.sequences),
    }
    print(f"{base}, {options.threads} threads, median of {options.rounds} rounds")
    print(f"{'':<14}{'side':<10}{'s a layer':>10}{'x base':>8}{'peak MiB':>10}{'x base':>8}{'streamed / plain':>28}")
    first: dict[str, Any] = {}
    for name, task in tasks.items():
        found = compare(task, options.rounds, options.threads)
        first = first or found
        for side, row in found.items():
            ratios = [row[key] / first[side][key] for key in ("seconds", "bytes")]
            against = [row[key] / found["plain"][key] for key in ("seconds", "bytes")]
            last = f"{against[0]:.2f} of time, {against[1]:.2f} of memory" if side == "streamed" else ""
            print(
                f"{name:<14}{side:<10}{row['seconds']:>10.3f}{ratios[0]:>8.2f}{row['bytes'] / 2**20:>10.1f}"
                f"{ratios[1]:>8.2f}{last:>28}"
            )


if __name__ == "__main__":
    main()
