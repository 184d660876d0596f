"""The page of a comparison, from its workspace alone: comparison/index.html, comparison.json and comparison.md."""

from typing import Any

from orchestrator.comparison_checks import calibration_sequences
from orchestrator.methods import METHODS
from orchestrator.recipe_loading import recipe_from
from orchestrator.report_comparison_page import comparison_page
from orchestrator.report_comparison_text import comparison_markdown
from orchestrator.report_reading import RunRecord, read_run, without_nan
from orchestrator.report_text import nats, whole
from orchestrator.yaml_reading import read_yaml
from shearing.evaluation.paired import Difference, paired_difference
from shearing.storage import Store, open_store

CHOOSING_STAGES = ("pruning", "extraction", "slicing", "sparsifying")
RECOVERY_STAGES = ("recovery", "scratch")
MOMENTS = ("before", "after")


def build_comparison(workspace: Store) -> dict[str, Any]:
    """Write the page of a comparison whose models are measured, and return its contents."""
    found = without_nan(comparison_contents(workspace))
    workspace.write_json("comparison/comparison.json", found)
    workspace.write_bytes("comparison/comparison.md", comparison_markdown(found).encode())
    workspace.write_bytes("comparison/index.html", comparison_page(found).encode())
    return found


def comparison_contents(workspace: Store) -> dict[str, Any]:
    """Every number of the page."""
    recipe = read_yaml(workspace.read_bytes("recipe.yaml").decode(), "recipe.yaml")
    outputs = {name: workspace.read_json(f"stages/{name}.json")["outputs"] for name in ("methods", "measures")}
    measured = outputs["measures"]["models"]
    source = measured["source"]
    methods = [
        _method(name, read_run(open_store(uri)), uri, measured) for name, uri in outputs["methods"]["runs"].items()
    ]
    return {
        "name": recipe["name"],
        "domains": list(source["losses"]),
        "target": recipe["pruning"]["target"],
        "parameters": outputs["methods"]["parameters"],
        "source": _figures(source) | {"parameters": source["parameters"]},
        "methods": methods,
        "failed": outputs["methods"]["failed"],
        "protocol": outputs["measures"]["protocol"],
        "verdict": verdict(measured, list(outputs["methods"]["runs"]), outputs["methods"]["parameters"]),
    }


def _method(name: str, run: RunRecord, uri: str, measured: dict[str, Any]) -> dict[str, Any]:
    result = measured[f"{name}/after"]
    moments = {moment: measured.get(f"{name}/{moment}") for moment in MOMENTS}
    return {
        "name": name,
        "title": METHODS[name].title,
        "workspace": uri,
        "has_report": "report" not in METHODS[name].left_out,
        "parameters": result["parameters"],
        "nonzero_parameters": result["nonzero_parameters"],
        **{moment: _moment(entry, measured["source"]) for moment, entry in moments.items()},
        **_size_and_speed(result),
        "seconds": {
            "choosing": _seconds(run, CHOOSING_STAGES),
            "recovery": _seconds(run, RECOVERY_STAGES),
        },
        "tokens": {
            "calibration": _calibration_tokens(run.recipe),
            "mask_learning": _trained_tokens(run, "pruning"),
            "recovery": sum(_trained_tokens(run, phase) for phase in RECOVERY_STAGES),
        },
    }


def _moment(entry: dict[str, Any] | None, source: dict[str, Any]) -> dict[str, Any] | None:
    if entry is None:
        return None
    difference = paired_difference(entry["sequence_losses"], source["sequence_losses"])
    return _losses(entry) | {"to_source": _as_json(difference)}


def _losses(entry: dict[str, Any]) -> dict[str, Any]:
    wanted = ("losses", "perplexity", "mean_loss", "nonzero_parameters", "text", "tasks")
    return {key: entry[key] for key in wanted if key in entry}


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
    return _losses(entry) | _size_and_speed(entry)


def _size_and_speed(entry: dict[str, Any]) -> dict[str, Any]:
    wanted = ("disk_bytes", "peak_memory_bytes", "prefill_tokens_per_s", "prefill_quartiles", "decode_tokens_per_s",
              "decode_quartiles")  # fmt: skip
    return {key: entry[key] for key in wanted}


def _seconds(run: RunRecord, stages: tuple[str, ...]) -> float:
    return sum(run.stages[stage].get("seconds") or 0.0 for stage in stages if stage in run.stages)


def _trained_tokens(run: RunRecord, phase: str) -> int:
    steps = run.phases[phase].steps if phase in run.phases else []
    return int(steps[-1]["tokens"]) if steps else 0


def _calibration_tokens(recipe: dict[str, Any]) -> int:
    derived = recipe_from(recipe)
    return calibration_sequences(derived) * derived.corpus.sequence_tokens


def _as_json(difference: Difference) -> dict[str, Any]:
    return {
        "nats": difference.nats,
        "standard_error": difference.standard_error,
        "is_noise": difference.is_noise,
    }


def verdict(measured: dict[str, Any], names: list[str], most: int) -> str:
    """Which method is best at the size compared, before and after recovery, by how much, and which ones equal it.

    Args:
        measured: Of every model, by name.
        names: Of the methods.
        most: Parameters that are not zero, at most; methods with more are named apart.
    """
    sentences = []
    for moment in MOMENTS:
        entries = {name: entry for name in names if (entry := measured.get(f"{name}/{moment}"))}
        small = {name: entry for name, entry in entries.items() if entry["nonzero_parameters"] <= most}
        large = [f"{_named(name)} {nats(entries[name]['mean_loss'])}" for name in entries if name not in small]
        if small:
            sentences.append(_best(f"{moment.capitalize()} recovery, at {whole(most)} parameters or fewer,", small))
        if large:
            sentences.append(f"Larger ones {moment} recovery: {', '.join(large)}.")
    return " ".join(sentences)


def _best(opening: str, entries: dict[str, Any]) -> str:
    best, *others = sorted(entries, key=lambda name: entries[name]["mean_loss"])
    first = f"{opening} {_named(best)} is best of {len(entries)}: {nats(entries[best]['mean_loss'])} nats a token"
    if not others:
        return f"{first}."
    apart = {n: paired_difference(entries[n]["sequence_losses"], entries[best]["sequence_losses"]) for n in others}
    second = apart[others[0]]
    margin = f"{second.nats:.3f} ± {second.standard_error:.3f} below {_named(others[0])}"
    equal = [_named(name) for name, difference in apart.items() if difference.is_noise]
    if not equal:
        return f"{first}, {margin}, which is more than noise."
    return f"{first}, {margin}; within noise of it: {', '.join(equal)}."


def _named(name: str) -> str:
    return METHODS[name].title
