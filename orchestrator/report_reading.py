"""Reads everything a run left in its workspace, and bears that parts of it are missing."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.yaml_reading import read_yaml
from shearing.data.manifest import Manifest, load_manifest
from shearing.storage import Store, open_store

PHASES = ("source", "pruning", "recovery", "scratch")
INTERRUPTION = "resumed"  # the event of a phase that goes on
STEP_PARTS = ("data_wait_s", "forward_backward_s", "communication_s", "update_s")
"""What a step's row says of its parts, which add up to its `step_s`."""


@dataclass(frozen=True)
class PhaseRecord:
    """The metrics of one phase: the last row of each step and kind, and every event."""

    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    events: list[dict[str, Any]]
    repeated_steps: int
    unreadable_lines: int


@dataclass(frozen=True)
class RunRecord:
    """A workspace as read. What is missing is empty. `asked` names the stages that the run goes through, in order."""

    recipe: dict[str, Any]
    recipe_text: str
    asked: list[str]
    stages: dict[str, dict[str, Any]]
    phases: dict[str, PhaseRecord]
    mixture: dict[str, list[dict[str, Any]]]
    versions: dict[str, str]
    manifest: Manifest | None
    manifest_problem: str = ""
    domains: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    forecasts: dict[str, dict[str, float]] = field(default_factory=dict)

    def outputs(self, stage: str) -> dict[str, Any]:
        """What a finished stage put out; empty where it did not finish."""
        mark = self.stages.get(stage, {})
        return dict(mark.get("outputs") or {}) if mark.get("finished") else {}


def read_run(workspace: Store) -> RunRecord:
    """Everything in a workspace that a report speaks of."""
    recipe_text = workspace.read_bytes("recipe.yaml").decode() if workspace.exists("recipe.yaml") else ""
    recipe = read_yaml(recipe_text, "recipe.yaml") or {}  # as it was written: YAML 1.1 takes 2:4 for a number
    stages = {name: workspace.read_json(f"stages/{name}.json") for name in _names(workspace, "stages", ".json")}
    phases = {
        phase: read_phase(workspace.read_bytes(f"metrics/{phase}.jsonl"))
        for phase in PHASES
        if workspace.exists(f"metrics/{phase}.jsonl")
    }
    mixture = {phase: _mixture(workspace, phase) for phase in PHASES}
    manifest, problem = _manifest(stages)
    domains = list((recipe.get("corpus") or {}).get("domains") or (manifest.domains if manifest else {}))
    return RunRecord(
        recipe=recipe,
        recipe_text=recipe_text,
        asked=workspace.read_json("stages.json") if workspace.exists("stages.json") else list(stages),
        stages=stages,
        phases=phases,
        mixture={phase: versions for phase, versions in mixture.items() if versions},
        versions=_versions(stages),
        manifest=manifest,
        manifest_problem=problem,
        domains=domains,
        layers=_layers(workspace),
        forecasts={
            name: workspace.read_json(f"forecast/{name}.json") for name in _names(workspace, "forecast", ".json")
        },
    )


def _layers(workspace: Store) -> list[dict[str, Any]]:
    """The last row of each layer that was sliced."""
    name = "metrics/slicing.jsonl"
    rows = _rows(workspace.read_bytes(name)) if workspace.exists(name) else iter(())
    last = {row["step"]: row for row in rows if row is not None and row["kind"] == "layer"}
    return [last[step] for step in sorted(last)]


def read_phase(data: bytes) -> PhaseRecord:
    """Metrics of one phase from JSON lines. A killed writer's half line is counted and left out."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    events: dict[Any, dict[str, Any]] = {}
    seen = unreadable = 0
    for number, row in enumerate(_rows(data)):
        if row is None:
            unreadable += 1
        elif row["kind"] == "event":
            # what happened to the run is history; what a repeated step says again happened once
            happened = number if row.get("event") == INTERRUPTION else (row["step"], row.get("event"), row.get("text"))
            events[happened] = row
        else:
            seen += row["kind"] == "step"
            last[row["kind"], row["step"]] = row
    rows = {
        name: sorted((row for (kind, _), row in last.items() if kind == name), key=_step)
        for name in ("start", "step", "evaluation", "checkpoint")
    }
    return PhaseRecord(
        starts=rows["start"],
        steps=rows["step"],
        evaluations=rows["evaluation"],
        checkpoints=rows["checkpoint"],
        events=sorted(events.values(), key=_step),
        repeated_steps=seen - len(rows["step"]),
        unreadable_lines=unreadable,
    )


def step_shares(rows: list[dict[str, Any]], last: int | None = None) -> dict[str, float]:
    """Part -> its share of the time of the steps that were split, or of the last few of them; empty where none was.

    On GPUs few steps are split, in logs of earlier releases none.
    """
    split = [row for row in rows if row.keys() >= set(STEP_PARTS)]
    split = split[-last:] if last else split
    whole = sum(row["step_s"] for row in split)
    return {part.removesuffix("_s"): sum(row[part] for row in split) / whole for part in STEP_PARTS} if whole else {}


def without_nan(value: Any) -> Any:
    """The same value with None for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


def _step(row: dict[str, Any]) -> int:
    return int(row["step"])


def _rows(data: bytes) -> Iterator[dict[str, Any] | None]:
    for line in data.splitlines():
        if line.strip():
            try:
                row = json.loads(line)
                yield row if {"kind", "step"} <= row.keys() else None
            except (ValueError, AttributeError):
                yield None


def _names(workspace: Store, folder: str, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in workspace.list(folder) if name.endswith(suffix)]


def _mixture(workspace: Store, phase: str) -> list[dict[str, Any]]:
    names = _names(workspace, f"mixture/{phase}", ".json")
    return [workspace.read_json(f"mixture/{phase}/{name}.json") for name in names]


def _manifest(stages: dict[str, dict[str, Any]]) -> tuple[Manifest | None, str]:
    path = (stages.get("corpus", {}).get("outputs") or {}).get("path")
    if path is None:
        return None, "the corpus was not prepared in this run"
    try:
        return load_manifest(open_store(path)), ""
    except (OSError, ValueError) as error:
        return None, f"the corpus at {path} cannot be read from here ({error})"


def _versions(stages: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Package -> version, or each of its versions with the stages that had it, in the order of time."""
    had: dict[str, dict[str, list[str]]] = {}
    for name, mark in sorted(stages.items(), key=lambda item: float(item[1].get("started") or 0.0)):
        for package, version in (mark.get("versions") or {}).items():
            had.setdefault(package, {}).setdefault(version, []).append(name)
    return {
        package: next(iter(by_version))
        if len(by_version) == 1
        else ", ".join(f"{version} ({', '.join(names)})" for version, names in by_version.items())
        for package, by_version in had.items()
    }
