"""Runs the real command on small text and reads what it left, without the project's own readers of it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pipelines" / "shear.py"
SHARED = ROOT / ".." / "shared"
RECIPE = """
name: small
workspace: {folder}/run
corpus:
  path: {corpora}
  root: {text}
  sequence_tokens: 64
  split: {{eval: 0.1, prune: 0.4}}
  section_characters: 1000
  domains:
    prose: {{text: prose.txt, proportion: 0.5}}
    code: {{text: code.jsonl, proportion: 0.3}}
    tables: {{text: tables.jsonl, proportion: 0.2}}
source:
  train:
    shape: {{num_layers: 3, hidden_size: 32, num_heads: 4, num_kv_heads: 4, head_size: 8, intermediate_size: 88}}
    tokenizer: {{vocab_size: 512}}
    steps: 6
    global_batch_tokens: 512
    learning_rate: 3e-3
references: {{kind: source}}
mixture: {{rule: sheared}}
engine: {{workers: 2, cpus_per_worker: 0.5, zero_stage: 3, dtype: float32, micro_batch_sequences: 2}}
pruning:
  steps: 24
  global_batch_tokens: 512
  learning_rate: 1e-3
  evaluate_every_steps: 4
  checkpoint_every_steps: 8
  target: {{num_layers: 2, hidden_size: 24, num_heads: 3, intermediate_size: 64}}
  gates: {{sparsity_warmup_steps: 8, extra_steps: 0}}
recovery:
  steps: 24
  global_batch_tokens: 512
  learning_rate: 1e-3
  evaluate_every_steps: 4
  checkpoint_every_steps: 8
evaluation: {{sequences_per_domain: 4}}
scores: {{prompt_tokens: 16, decode_tokens: 4}}
"""
GOLDEN = (
    "source.train=null",
    f"source.model={(SHARED / 'golden/models/llama_gqa').resolve()}",
    "pruning.target={num_layers: 3, hidden_size: 96, num_heads: 2, intermediate_size: 256}",
)


def write_text(folder: Path) -> None:
    """Three kinds of text that a small model can tell apart; `tables` is so little that it is repeated in training."""
    folder.mkdir(parents=True)
    dice = random.Random(5)
    words = ["".join(dice.choices("abcdefghilmnoprstuv", k=dice.randint(2, 8))) for _ in range(400)]
    prose = "\n".join(" ".join(dice.choices(words, k=60)).capitalize() + "." for _ in range(300))
    (folder / "prose.txt").write_text(prose)
    code = (
        "\n".join(f"def {a}_{b}({c}):\n    return {a}({c}) + {n}\n" for a, b, c, n in _names(dice, words, 8))
        for _ in range(300)
    )
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in code))
    rows = (" | ".join(str(dice.randint(0, 9999)) for _ in range(40)) for _ in range(30))
    (folder / "tables.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def _names(dice: random.Random, words: list[str], count: int) -> list[tuple[str, str, str, int]]:
    return [(*dice.choices(words, k=3), dice.randint(0, 99)) for _ in range(count)]


@dataclass(frozen=True)
class Journey:
    """A recipe with its run's folder, and the words of the command that runs it."""

    workspace: Path
    arguments: list[str]

    def with_overrides(self, *overrides: str) -> "Journey":
        return Journey(self.workspace, [*self.arguments, *overrides])

    def start(self, **more: str) -> subprocess.Popen:
        """The real command, in a process group of its own; `more` is added to its environment."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment() | more,
            start_new_session=True,
        )

    def run(self, timeout_s: float = 400, **more: str) -> subprocess.CompletedProcess:
        """The real command to its end."""
        process = self.start(**more)
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            end_with_children(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, name: str) -> Any:
        return json.loads((self.workspace / name).read_text())

    def rows(self, phase: str) -> list[dict[str, Any]]:
        """All whole rows of a phase's metrics, as written."""
        file = self.workspace / "metrics" / f"{phase}.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def checkpoints(self, phase: str) -> list[Path]:
        return sorted((self.workspace / "checkpoints" / phase).glob("step-*"))


def small_journey(folder: Path, shared: Path | None = None) -> Journey:
    """A run on text that the test writes; `shared` holds text and prepared corpora that several runs use."""
    home = shared or folder
    if not (home / "text").exists():
        write_text(home / "text")
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(RECIPE.format(folder=folder, text=home / "text", corpora=home / "corpora"))
    return Journey(folder / "run", [str(folder / "small.yaml")])


def redpajama_journey(folder: Path, *overrides: str) -> Journey:
    """A run on the real sample in RedPajama's layout, in few steps."""
    few = [
        f"{phase}.{key}"
        for phase in ("pruning", "recovery")
        for key in ("steps=8", "warmup_steps=1", "global_batch_tokens=1024", "evaluate_every_steps=4")
    ]
    arguments = [
        str(ROOT / "pipelines/recipes/redpajama-sample.yaml"),
        f"corpus.root={(SHARED / 'data/redpajama_sample').resolve()}",
        f"corpus.path={folder}/corpora",
        f"workspace={folder}/run",
        "engine.cpus_per_worker=0.5",
        "engine.micro_batch_sequences=2",
        "pruning.gates={sparsity_warmup_steps: 2, extra_steps: 0}",
        "pruning.checkpoint_every_steps=4",
        "recovery.checkpoint_every_steps=4",
        "evaluation.sequences_per_domain=4",
        "scores.prompt_tokens=16",
        "scores.decode_tokens=4",
        *few,
        *overrides,
    ]
    return Journey(folder / "run", arguments)


def environment() -> dict[str, str]:
    """This process's, without what would make the command join a cluster."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def last_rows(rows: list[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    """step -> the last row of it: a resumed run repeats the steps after its checkpoint."""
    return {row["step"]: row for row in rows if row["kind"] == kind}


def newest_step(journey: Journey, phase: str, after_row: int = 0) -> int:
    """The newest step in a phase's metrics, or in those from a row on; 0 where there is none."""
    return max(last_rows(journey.rows(phase)[after_row:], "step"), default=0)


def consumed(checkpoint: Path) -> dict[str, int]:
    """domain -> bits that are set in its bitmaps, all epochs together."""
    counts: dict[str, int] = {}
    for name, bitmap in load_file(checkpoint / "consumed.safetensors").items():
        domain = name.rpartition("/")[0]
        counts[domain] = counts.get(domain, 0) + int(np.unpackbits(bitmap).sum())
    return counts


def check_data_account(rows: list[dict[str, Any]], steps: int, batch_sequences: int, newest: Path) -> None:
    """Every step once, each with a batch of new draws, and as many different sequences consumed as were drawn."""
    last = last_rows(rows, "step")
    assert sorted(last) == list(range(1, steps + 1)), "a step is missing"
    drawn = dict.fromkeys(last[1]["drawn"], 0)
    for step in range(1, steps + 1):
        assert all(last[step]["drawn"][domain] >= drawn[domain] for domain in drawn), f"step {step} drew backwards"
        drawn = last[step]["drawn"]
        assert sum(drawn.values()) == step * batch_sequences, f"step {step} lost or repeated sequences"
    assert json.loads((newest / "state.json").read_text())["step"] == steps
    # A bitmap bit can be set once only: with as many bits as draws, no sequence came twice within an epoch.
    assert {domain: count for domain, count in consumed(newest).items() if count} == {
        d: n for d, n in drawn.items() if n
    }


def largest_loss_difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Over all steps and evaluations that both have, as last written."""
    differences = [0.0]
    for kind in ("step", "evaluation"):
        mine, others = last_rows(rows, kind), last_rows(expected, kind)
        for step in mine.keys() & others.keys():
            if kind == "step":
                differences.append(abs(mine[step]["loss"] - others[step]["loss"]))
            else:
                losses = mine[step]["losses"]
                differences += [abs(losses[domain] - others[step]["losses"][domain]) for domain in losses]
    return max(differences)


def wait_until(holds: Callable[[], Any], what: str, timeout_s: float = 300, every_s: float = 0.02) -> Any:
    """What `holds` returns once it is true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what}"
        time.sleep(every_s)
    return found


def ray_processes(parent: int, title: str) -> list[psutil.Process]:
    """Ray's worker processes below a process whose title (`ray::SequenceFeeder.fetch`) begins so."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def end_with_children(process: subprocess.Popen) -> None:
    """End a process that a test started, and all below it, if any is left."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end_of(folder: str) -> None:
    """End what a node started for itself: processes that name its folder, which no other node has."""
    for process in psutil.process_iter():
        try:
            if folder in " ".join(process.cmdline()):
                process.kill()
        except psutil.Error:
            continue
