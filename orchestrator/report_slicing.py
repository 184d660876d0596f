"""What a report says of slicing: sizes of the signals, what they kept, its cost, and whether rotation was exact."""

from typing import Any

from orchestrator.report_fact import Fact, fact
from orchestrator.report_reading import RunRecord
from orchestrator.report_text import Table, byte_size, duration, nats, percent, signed_nats, whole

PROOF_NAMES = {
    "dense": "Dense: the source",
    "rotated": "Fused and rotated at full size, read back from disk",
    "sliced": "Sliced, read back from disk",
    "recovered": "Recovered",
}


def is_sliced(recipe: dict[str, Any]) -> bool:
    """Whether a recorded recipe is of a run that slices."""
    return recipe.get("slicing") is not None and recipe.get("pruning") is None


def slicing(run: RunRecord) -> dict[str, Any] | None:
    """The stage's figures for the report; None where it has not finished."""
    outputs = run.outputs("slicing")
    if not outputs:
        return None
    layers, kept = outputs["source_shape"]["num_layers"], outputs["kept"]
    halves = ("attention", "MLP") if len(kept) == 1 + 2 * layers else ("attention and MLP",)
    places = ["embedding", *(f"layer {layer}, {half}" for layer in range(layers) for half in halves)]
    shares = outputs["kept_variance"]
    each = shares if len(shares) == len(kept) else [None] * len(kept)
    return {
        **{key: outputs[key] for key in ("agrees", "largest_difference", "agreement_tolerance", "parameters")},
        "proof": outputs["proof"] | _recovered(run),
        "size": outputs["source_shape"]["hidden_size"],
        "signals": [
            {"after": place, "kept": size, "kept_variance": share}
            for place, size, share in zip(places, kept, each, strict=True)
        ],
        "kept_variance": sum(shares) / len(shares),
        "layers": run.layers,
    }


def _recovered(run: RunRecord) -> dict[str, Any]:
    scored = (run.outputs("scores").get("models") or {}).get("recovered")
    return {"recovered": {"mean": scored["mean_loss"], "domains": scored["losses"]}} if scored else {}


def sliced_shapes(outputs: dict[str, Any]) -> dict[str, Any]:
    """The source's shape and the result's, whose hidden size is the widest that a signal has before the last."""
    source = outputs["source_shape"]
    target = source | {"hidden_size": max(outputs["kept"][:-1])}
    return {"source": source, "target": target, "parameters": outputs["parameters"]}


def slicing_facts(report: dict[str, Any]) -> list[Fact]:
    """Whether rotation changed nothing, what slicing cost, and how much memory it took."""
    found = report["slicing"]
    if not found:
        return [fact("rotation", "open", "The model was sliced", "not run", "Slicing has not finished.")]
    value = f"largest difference {found['largest_difference']:.1e}, allowed {found['agreement_tolerance']:.1e}"
    why = "Norms fused and every signal rotated at full size, the model computes what its source does."
    facts = [fact("rotation", "good", "Rotation alone changes nothing", value, why)]
    if not found["agrees"]:
        why = "Fused and rotated at full size the model should compute what its source does: do not use the files."
        facts = [fact("rotation", "bad", "Rotation alone changes the model", value, why)]
    cost = found["proof"]["sliced"]["mean"] - found["proof"]["dense"]["mean"]
    value = f"{signed_nats(cost)} nats a token, {percent(found['kept_variance'])} of the signals' sum of squares kept"
    facts.append(fact("slicing", "info", "What slicing cost before recovery", value, "Against the source, held out."))
    matrices, whole_count = found["parameters"]["residual"], found["parameters"]["target"]
    why = "Slicing by a fraction is not that fraction fewer parameters: matrices between the signals count as well."
    if found["parameters"]["target"] >= found["parameters"]["source"]:
        value = f"{whole(whole_count)} of {whole(found['parameters']['source'])}"
        facts.append(fact("size", "warn", "The result is not smaller than its source", value, why))
    elif matrices:
        value = f"{percent(matrices / whole_count)} of the result's parameters"
        facts.append(fact("residuals", "info", "Matrices between the signals", value, why))
    if found["layers"]:
        seconds = sum(row["seconds"] for row in found["layers"])
        peaks = [max(row[key] for row in found["layers"]) for key in ("driver_peak_bytes", "worker_peak_bytes")]
        value = f"{duration(seconds)}, at most {byte_size(peaks[0])} in the driver and {byte_size(peaks[1])} a worker"
        why = "Layers come from the files one after another; the calibration text is spread over the workers."
        facts.append(fact("cost", "info", "What slicing took", value, why))
    return facts


def slicing_tables(report: dict[str, Any]) -> list[Table]:
    """Title, head and rows of each table."""
    found, domains = report["slicing"], report["domains"]
    if not found:
        return []
    losses = [
        [name, nats(part["mean"]), *(nats(part["domains"].get(d)) for d in domains)]
        for key, name in PROOF_NAMES.items()
        if (part := found["proof"].get(key))
    ]
    signals = [
        [row["after"], whole(row["kept"]), whole(found["size"]), percent(row["kept_variance"], 2)]
        for row in found["signals"]
    ]
    layers = [
        [
            str(row["step"] - 1),
            duration(row["seconds"]),
            *(byte_size(row[key]) for key in ("driver_peak_bytes", "worker_peak_bytes")),
        ]
        for row in found["layers"]
    ]
    return [
        ("Dense, rotated, sliced, recovered", ["Loss, nats a token", "mean", *domains], losses),
        ("What was kept of every signal", ["Signal after", "Kept", "of", "Sum of squares kept"], signals),
        ("Time and memory", ["Layer", "Time", "Peak in the driver", "Peak in a worker"], layers),
    ]
