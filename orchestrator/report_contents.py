"""A run as numbers: everything that the report shows, in one JSON value."""

import math
import statistics
from typing import Any

from orchestrator.report_mixture import evaluation_cost, replays, settings
from orchestrator.report_reading import INTERRUPTION, PhaseRecord, RunRecord, step_shares
from orchestrator.report_slicing import sliced_shapes, slicing

MOST_POINTS = 4000  # of a series; longer ones are thinned evenly, ends kept
MOST_LAYER_POINTS = 120  # of a series with a number a layer
SPLIT_OF_PHASE = {"source": "train", "pruning": "prune", "recovery": "train", "scratch": "train"}


def contents(run: RunRecord) -> dict[str, Any]:
    """Every number of the report, series included. Parts that a run did not reach are None or empty."""
    extraction = run.outputs("extraction")
    return {
        "name": str(run.recipe.get("name", "unnamed run")),
        "domains": run.domains,
        "prior": {d: (run.recipe["corpus"]["domains"][d] or {}).get("proportion") for d in _recipe_domains(run)},
        "stages": [_stage(run, name) for name in run.asked if name != "report"],
        "shapes": _shapes(run, extraction),
        "references": run.outputs("references") or None,
        "extraction": extraction or None,
        "slicing": slicing(run),
        "phases": {phase: _phase(run, phase, record) for phase, record in run.phases.items()},
        "mixture": run.mixture,
        "settings": settings(run),
        "replays": replays(run),
        "scores": run.outputs("scores") or None,
        "recipe": run.recipe,
        "versions": run.versions,
        "provenance": _provenance(run),
    }


def _recipe_domains(run: RunRecord) -> list[str]:
    return list((run.recipe.get("corpus") or {}).get("domains") or {})


def _stage(run: RunRecord, name: str) -> dict[str, Any]:
    mark = run.stages.get(name)
    if mark is None:
        return {"stage": name, "state": "not run", "seconds": None, "started": None, "finished": None}
    state = "finished" if mark.get("finished") else "begun, not finished"
    return {"stage": name, "state": state} | {key: mark.get(key) for key in ("seconds", "started", "finished")}


def _shapes(run: RunRecord, extraction: dict[str, Any]) -> dict[str, Any] | None:
    if extraction:
        parameters = extraction.get("parameters", {})
        return {"source": extraction["source_shape"], "target": extraction["target_shape"], "parameters": parameters}
    if sliced := run.outputs("slicing"):
        return sliced_shapes(sliced)
    source = ((run.recipe.get("source") or {}).get("train") or {}).get("shape")
    asked = (run.recipe.get("pruning") or {}).get("target")
    if source and asked:
        wanted = {key: size for key, size in asked.items() if size is not None and key in source}
        return {"source": source, "target": {**source, **wanted}, "parameters": {}}
    return None


def _phase(run: RunRecord, phase: str, record: PhaseRecord) -> dict[str, Any]:
    rows = thin(record.steps)
    evaluations = record.evaluations
    return {
        "steps": [row["step"] for row in rows],
        **{
            key: [row.get(key) for row in rows]
            for key in ("tokens", "loss", "learning_rate", "tokens_per_s", "divergence")
        },
        "proportions": _columns(rows, "proportions", run.domains),
        "drawn": _columns(rows, "drawn", run.domains),
        "train_losses": _columns(rows, "losses", run.domains),
        "sparsity": _sparsity(rows),
        "evaluations": {
            "steps": [row["step"] for row in evaluations],
            **{key: _columns(evaluations, key, run.domains) for key in ("losses", "references", "proportions")},
            "mean_loss": [_mean(row.get("losses") or {}) for row in evaluations],
        },
        "events": [{key: row.get(key) for key in ("step", "event", "text", "time")} for row in record.events],
        "summary": _summary(run, phase, record),
        "data_use": _data_use(run, phase, record),
    }


def _sparsity(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups = next((list(row["sparsity"]) for row in reversed(rows) if row.get("sparsity")), [])
    keys = ("expected", "target", "undecided", "largest_layer_gap")
    states = {group: [(row.get("sparsity") or {}).get(group) or {} for row in rows] for group in groups}
    found = {group: {key: [state.get(key) for state in column] for key in keys} for group, column in states.items()}
    return {group: columns | _units(rows, group) for group, columns in found.items()}


def _units(rows: list[dict[str, Any]], group: str) -> dict[str, Any]:
    """Where each layer of a group ended, in units, and how it came there."""
    known = [(row["step"], state) for row in rows if "expected_units" in (state := (row.get("sparsity") or {})[group])]
    if not known:
        return {}
    shown = thin(known, MOST_LAYER_POINTS)
    last = known[-1][1]
    return {
        **{key: last[key] for key in ("size", "target_units", "expected_units", "undecided_units")},
        "layers": {
            "steps": [step for step, _ in shown],
            "kept_shares": [[units / last["size"] for units in state["expected_units"]] for _, state in shown],
        },
    }


def _summary(run: RunRecord, phase: str, record: PhaseRecord) -> dict[str, Any]:
    rows = record.steps
    if not rows:
        return {"steps": 0, "planned_steps": planned_steps(run, phase)}
    busy, waited = (sum(row.get(key) or 0.0 for row in rows) for key in ("step_s", "data_wait_s"))
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    domains_lost = [d for d in run.domains if any(_bad((row.get("losses") or {}).get(d, 0.0)) for row in rows)]
    return {
        "steps": rows[-1]["step"],
        "planned_steps": planned_steps(run, phase),
        "tokens": rows[-1].get("tokens"),
        "final_loss": rows[-1].get("loss"),
        "first_divergence": rows[0].get("divergence"),
        "final_divergence": rows[-1].get("divergence"),
        **evaluation_cost(record),
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "data_wait_share": waited / busy if busy else None,
        "step_shares": step_shares(rows),
        "interruptions": sum(row.get("event") == INTERRUPTION for row in record.events),
        "repeated_steps": record.repeated_steps,
        "unreadable_lines": record.unreadable_lines,
        "steps_with_bad_loss": sum(_bad(row.get("loss", 0.0)) for row in rows),
        "domains_with_bad_loss": domains_lost,
        **_accounting(run, record),
        **_time(run.forecasts.get(phase, {}), record),
    }


def _time(forecasts: dict[str, float], record: PhaseRecord) -> dict[str, Any]:
    """Seconds a step, all between steps included, of a phase that was not interrupted; and the forecast."""
    if len(record.steps) < 2 or any(row.get("event") == INTERRUPTION for row in record.events):
        return {}
    device = record.starts[-1]["device"] if record.starts else ""
    fitting = [seconds for name, seconds in forecasts.items() if len(forecasts) == 1 or name in device]
    first, last = record.steps[0], record.steps[-1]
    measured = (last["time"] - first["time"]) / (last["step"] - first["step"])
    return {"step_forecast_s": fitting[0], "step_measured_s": measured} if len(fitting) == 1 and measured > 0 else {}


def _accounting(run: RunRecord, record: PhaseRecord) -> dict[str, Any]:
    """Whether the sequences drawn explain every token trained on, and no step took any back or any twice."""
    tokens_each = (
        run.manifest.sequence_tokens if run.manifest else (run.recipe.get("corpus") or {}).get("sequence_tokens")
    )
    wrong = missing = 0
    before: dict[str, int] = {}
    expected_step = 1
    for row in record.steps:
        drawn = row.get("drawn") or {}
        missing += row["step"] != expected_step
        expected_step = row["step"] + 1
        shrank = any(count < before.get(domain, 0) for domain, count in drawn.items())
        explained = not tokens_each or sum(drawn.values()) * tokens_each == row.get("tokens")
        wrong += shrank or not explained
        before = drawn
    return {"steps_unaccounted": wrong, "gaps_in_steps": missing}


def _data_use(run: RunRecord, phase: str, record: PhaseRecord) -> dict[str, dict[str, Any]]:
    if not record.steps:
        return {}
    drawn = record.steps[-1].get("drawn") or {}
    total = sum(drawn.values())
    split = str(run.outputs(phase).get("split", SPLIT_OF_PHASE[phase]))
    use = {}
    for domain in run.domains:
        entry = run.manifest.domains.get(domain, {}).get(split) if run.manifest else None  # type: ignore[call-overload]
        sequences = int(drawn.get(domain, 0))
        use[domain] = {
            "sequences": sequences,
            "available": entry.sequences if entry else None,
            "epochs": sequences / entry.sequences if entry and entry.sequences else None,
            "share": sequences / total if total else None,
            "split": split,
        }
    return use


def planned_steps(run: RunRecord, phase: str) -> int | None:
    """Regular steps of a phase as the recipe asks for them."""
    section = {
        "source": (run.recipe.get("source") or {}).get("train"),
        "pruning": run.recipe.get("pruning"),
        "recovery": run.recipe.get("recovery"),
        "scratch": run.recipe.get("recovery"),
    }[phase]
    return (section or {}).get("steps")


def _provenance(run: RunRecord) -> dict[str, Any]:
    manifest = run.manifest
    if manifest is None:
        return {"problem": run.manifest_problem}
    domains = {}
    for domain, splits in manifest.domains.items():
        files = [file for file in manifest.sources if file.domain == domain]
        domains[domain] = {
            "files": len(files),
            "file_bytes": sum(file.file_bytes for file in files),
            "documents": sum(file.documents for file in files),
            "malformed": sum(file.malformed for file in files),
            "sequences": {split: entry.sequences for split, entry in splits.items()},
            "tokens": {split: entry.tokens for split, entry in splits.items()},
        }
    return {
        "problem": "",
        "fingerprint": manifest.fingerprint,
        "sequence_tokens": manifest.sequence_tokens,
        "tokenizer": manifest.tokenizer.model_dump(),
        "lines": manifest.lines,
        "malformed_lines": manifest.malformed_lines,
        "malformed": [line.model_dump() for line in manifest.malformed[:20]],
        "domains": domains,
        "files": [file.model_dump() for file in manifest.sources[:200]],
        "files_total": len(manifest.sources),
    }


def thin(rows: list[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most `most` rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _columns(rows: list[dict[str, Any]], key: str, domains: list[str]) -> dict[str, list[Any]]:
    return {d: [(row.get(key) or {}).get(d) for row in rows] for d in domains if any((r.get(key) or {}) for r in rows)}


def _mean(losses: dict[str, float | None]) -> float | None:
    values = list(losses.values())
    return sum(values) / len(values) if values and None not in values else None  # type: ignore[arg-type]


def _bad(loss: float | None) -> bool:
    return loss is None or not math.isfinite(loss)
