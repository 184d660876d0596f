"""Seconds from the command to the first optimiser step.

    python benchmarks/start.py [--rounds 3] [key.sub=value ...]

The command is `python pipelines/shear.py` on the quickstart's recipe with a prepared corpus, a named source model of
its shape and given reference losses, so that mask learning is the first real work; Ray starts embedded. It is stopped
after its first step. The floor is what no run can do without: a plain Python that imports torch, transformers and
deepspeed and loads the same model. `traced` is the same command with marks in the driver and in the worker of rank 0;
its parts follow one another and add up to the whole. A first run, which prepares the corpus and warms the file cache,
is not counted. Any key of the recipe can be set, as in `engine.workers=1`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHEAR = ROOT / "pipelines" / "shear.py"
QUICKSTART = ROOT / "pipelines" / "recipes" / "quickstart.yaml"
TRACE_VARIABLE = "SHEAR_START_TRACE"
LIMIT_S = 300
FLOOR = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch, transformers, deepspeed
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
PARTS = {
    "python": "Python starts",
    "imports": "the command's imports",
    "preflight": "recipe and preflight",
    "workspace": "workspace, finding out what is done",
    "ray": "ray.init",
    "corpus": "corpus is found, source and references are read",
    "driver": "the driver imports training",
    "actors": "log, weights and feeder are asked for",
    "worker": "Ray Train: controller, worker group, process group",
    "worker_imports": "the workers import training",
    "deepspeed": "deepspeed is imported",
    "trainer": "model, gates, engine, held-out text",
    "evaluation": "held-out evaluation before the first step",
    "batch": "waiting for the first batch",
    "step": "first optimiser step",
}


def mark(path: str, part: str) -> None:
    """Note that a part has ended now."""
    with open(path, "a") as file:
        file.write(json.dumps({"part": part, "time": time.time()}) + "\n")


def marked(path: str, function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function, with a mark when it returns."""

    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        mark(path, part)
        return result

    return call


def traced_worker(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The worker's function with marks in the worker of rank 0."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    if first:
        mark(path, "worker")
    from actors import training
    from shearing.training.loop import Trainer

    if first:
        mark(path, "worker_imports")
        training.prepare_deepspeed = marked(path, training.prepare_deepspeed, "deepspeed")
        training.build_trainer = marked(path, training.build_trainer, "trainer")
        for method, part in (("evaluate", "evaluation"), ("next_batch", "batch"), ("finish_step", "step")):
            setattr(Trainer, method, marked(path, getattr(Trainer, method), part))
    return training.train_worker(settings)


def traced_command(arguments: list[str], path: str) -> int:
    """What pipelines/shear.py does, with marks where one part ends and the next begins."""
    mark(path, "python")
    from orchestrator import command, run
    from orchestrator.ray_session import RaySession

    mark(path, "imports")
    command.preflight = marked(path, command.preflight, "preflight")
    start, run_stage = RaySession.start, run.run_stage

    def start_ray(session: RaySession, console: Any) -> None:
        if not session._started:
            mark(path, "workspace")
            start(session, console)
            mark(path, "ray")

    def stage(stage: Any, context: Any) -> Any:
        if stage.name == "pruning":
            mark(path, "corpus")
            from actors import training
            from orchestrator import training_stages  # noqa: F401

            mark(path, "driver")
            training.train_worker = partial(traced_worker, path)
            fit = training._fit

            def marked_fit(*given: Any) -> Any:
                mark(path, "actors")
                return fit(*given)

            training._fit = marked_fit
        return run_stage(stage, context)

    RaySession.start, run.run_stage = start_ray, stage
    found = command.Command(arguments[0], arguments[1:])
    return command.run_command(found, sys.stdout, sys.stderr)


def first_step(workspace: Path) -> float | None:
    """When the first step was reported, if it was."""
    log = workspace / "metrics" / "pruning.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        if line.endswith("}") and (row := json.loads(line))["kind"] == "step":
            return float(row["time"])
    return None


def run_command(command: list[str], workspace: Path, trace: Path | None) -> float:
    """Seconds from the command to its first step; then it is stopped."""
    environment = os.environ | ({TRACE_VARIABLE: str(trace)} if trace else {})
    environment.pop("RAY_ADDRESS", None)
    said = workspace.with_suffix(".log")
    with open(said, "w") as file:
        began = time.time()
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=workspace.parent, env=environment)
        try:
            while (stepped := first_step(workspace)) is None:
                if process.poll() is not None or time.time() - began > LIMIT_S:
                    raise RuntimeError(f"no step in {time.time() - began:.0f} s:\n{said.read_text()}")
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    return stepped - began


def floor(model: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR, model], check=True, capture_output=True)
    return time.perf_counter() - began


def parts_of(trace: Path, began: float) -> dict[str, float]:
    """Seconds of each part; a part that is marked again later counts once."""
    seconds: dict[str, float] = {}
    before = began
    for line in trace.read_text().splitlines():
        row = json.loads(line)
        if row["part"] not in seconds:
            seconds[row["part"]], before = row["time"] - before, row["time"]
    return seconds


def make_model(folder: Path, texts: list[str]) -> str:
    """A source model of the quickstart's shape with fresh weights, and the tokenizer of its text."""
    from orchestrator.recipe_loading import load_recipe
    from shearing.data.tokenizer_training import ensure_trained_tokenizer
    from shearing.models.family import llama_config
    from shearing.models.loading import model_tensors, new_model, write_model_directory

    recipe = load_recipe(str(QUICKSTART), texts)
    train = recipe.source.train
    assert train is not None
    tokenizer = ensure_trained_tokenizer(recipe.corpus, train.tokenizer)
    config = llama_config(train.shape, train.tokenizer.vocab_size, 2 * recipe.corpus.sequence_tokens)
    tensors = model_tensors(new_model(config))
    write_model_directory(folder / "model", config, tensors, tokenizer_folder=tokenizer)
    return str(folder / "model")


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    from orchestrator.recipe_loading import load_recipe

    domains = list(load_recipe(str(QUICKSTART), []).corpus.domains)
    texts = [f"corpus.path={folder}/corpora"]
    texts += [f"corpus.domains.{name}.text=installed:{name}?megabytes={options.megabytes}" for name in domains]
    model = make_model(folder, texts)
    given = "{" + ", ".join(f"{name}: 3.0" for name in domains) + "}"
    texts += [f"source.model={model}", "source.train=null", "references.kind=values", f"references.values={given}"]
    totals: dict[str, list[float]] = {"floor": [], "command": [], "traced": []}
    parts = []
    for number in range(-1, options.rounds):
        words = [str(QUICKSTART), *texts, *options.overrides]
        plain, traced = folder / f"plain{number}", folder / f"traced{number}"
        seconds = run_command([sys.executable, str(SHEAR), *words, f"workspace={plain}"], plain, None)
        if number < 0:
            continue
        totals["command"].append(seconds)
        totals["floor"].append(floor(model))
        trace, began = folder / f"trace{number}", time.time()
        command = [sys.executable, str(Path(__file__).resolve()), *words, f"workspace={traced}"]
        totals["traced"].append(run_command(command, traced, trace))
        parts.append(parts_of(trace, began))
    return totals, parts


def table(totals: dict[str, list[float]], parts: list[dict[str, float]]) -> str:
    lines = [f"{'seconds':52}{'median':>8}{'lowest':>8}{'highest':>8}{'share':>8}"]
    whole = statistics.median(totals["traced"])
    for part, title in PARTS.items():
        values = [found[part] for found in parts]
        share = 100 * statistics.median(values) / whole
        lines.append(f"  {title:50}{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}{share:7.1f}%")
    titles = {
        "traced": "the command, traced: sum of the above",
        "command": "the command as it is",
        "floor": "floor: imports and model in a plain Python",
    }
    for name, title in titles.items():
        values = totals[name]
        lines.append(f"{title:52}{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}")
    ratios = [command / least for command, least in zip(totals["command"], totals["floor"], strict=True)]
    lines.append(f"command / floor: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the quickstart's recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=1.0, help="text of each domain")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="shear-benchmark-", ignore_cleanup_errors=True) as folder:
        print(table(*measure(Path(folder), options)))
    return 0


if __name__ == "__main__":
    trace_file = os.environ.get(TRACE_VARIABLE)
    sys.exit(traced_command(sys.argv[1:], trace_file) if trace_file else main())
