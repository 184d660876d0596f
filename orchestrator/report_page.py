"""The report as one HTML page: figures drawn, template filled."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from orchestrator import report_charts, report_pictures, report_text
from orchestrator.report_slicing import is_sliced, slicing_tables

TEMPLATE = Path(__file__).with_name("report.html.j2")
FILTERS = (
    "nats",
    "signed_nats",
    "perplexity",
    "percent",
    "times",
    "whole",
    "compact",
    "byte_size",
    "duration",
    "units",
)
NAMES = ("SHAPE_NAMES", "MODEL_NAMES", "PROOF_NAMES", "PHASE_NAMES", "MARKS", "ABSENT")
FUNCTIONS = ("forced_sentence", "uneven_rows")


def page(report: dict[str, Any]) -> str:
    """The whole page, self-contained: style, figures and text in one file, nothing loaded, no script."""
    sliced = slicing_tables(report) if is_sliced(report["recipe"]) else None
    template = page_environment().get_template(TEMPLATE.name)
    return template.render(report=report, figures=figures(report), sliced=sliced)


def page_environment() -> jinja2.Environment:
    """What turns templates into pages, with numbers as readers see them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(report_text, name) for name in FILTERS}
    environment.filters["day"] = _day
    environment.globals |= {name: getattr(report_text, name) for name in (*NAMES, *FUNCTIONS)}
    return environment


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the page as SVG; what a run has no numbers for is left out."""
    domains, phases = report["domains"], report["phases"]
    pruning = phases.get("pruning") or {"sparsity": {}}
    losses: dict[str, dict[str, str]] = {}
    for phase, part in phases.items():
        measured = part["evaluations"]
        losses[phase] = {
            d: report_charts.domain_loss_chart(f"loss-{phase}-{i}", d, i, measured)
            for i, d in enumerate(domains)
            if any(value is not None for value in measured["losses"].get(d, []))
        }
    return {
        "sparsity": {g: report_charts.sparsity_chart(f"sparsity-{g}", g, pruning) for g in pruning["sparsity"]},
        "heat": {
            group: report_pictures.heat(part["layers"]["kept_shares"], f"Share of {group} kept, by layer and step")
            for group, part in pruning["sparsity"].items()
            if len(part.get("expected_units", [])) > 1
        },
        "losses": losses,
        "proportions": {
            phase: report_charts.proportions_chart(f"mix-{phase}", domains, part)
            for phase, part in phases.items()
            if part["proportions"] and len(part["steps"]) > 1
        },
        "drawn": {
            phase: report_charts.drawn_chart(f"drawn-{phase}", domains, part)
            for phase, part in phases.items()
            if part["drawn"] and len(part["steps"]) > 1
        },
        "comparison": _comparison(report),
        "kept": _kept(report["extraction"]),
    }


def _comparison(report: dict[str, Any]) -> str:
    curves = {}
    for phase, name in (("recovery", "smaller, healed"), ("scratch", "from nothing")):
        part = report["phases"].get(phase)
        if part and any(loss is not None for loss in part["evaluations"]["mean_loss"]):
            tokens = dict(zip(part["steps"], part["tokens"], strict=True))
            each = (part["tokens"][-1] or 0) / part["steps"][-1]
            xs = [tokens.get(step) or step * each for step in part["evaluations"]["steps"]]
            curves[name] = (xs, part["evaluations"]["mean_loss"])
    source = (
        ((report["references"] or {}).get("losses")) if (report["references"] or {}).get("kind") == "source" else None
    )
    level = sum(source.values()) / len(source) if source else None
    return report_charts.comparison_chart("comparison", curves, level) if curves else ""


def _kept(extraction: dict[str, Any] | None) -> list[dict[str, str]]:
    """A picture a group: title, picture, and how to read it."""
    kept = (extraction or {}).get("kept")
    if not extraction or not kept:
        return []
    source = extraction["source_shape"]
    layers = kept.get("layer") or list(range(source["num_layers"]))
    pictures = []
    for group, size, title in _head_groups(kept, source):
        rows = _by_source_layer(kept[group], layers, source["num_layers"])
        picture = report_pictures.cell_grid(rows, size, layers, title)
        how = "A row is a layer of the source model, a cell one of its heads: filled is kept, hollow is removed."
        pictures.append({"title": title, "svg": picture, "how": f"{how} A struck row left with its whole layer."})
    if kept.get("hidden"):
        size = source["hidden_size"]
        how = f"{len(kept['hidden'])} of {size} dimensions of the residual stream, in the source's order: dark is kept."
        picture = report_pictures.strips([kept["hidden"]], size, None, "Hidden dimensions kept")
        pictures.append({"title": "Hidden dimensions", "svg": picture, "how": f"{how} Every layer shares them."})
    if kept.get("intermediate"):
        size = source["intermediate_size"]
        rows = _by_source_layer(kept["intermediate"], layers, source["num_layers"])
        picture = report_pictures.strips(rows, size, layers, "Intermediate units kept in each layer")
        how = "A row is the MLP of one source layer, from its first unit to its last: filled is kept, pale is removed."
        pictures.append({"title": "Intermediate units", "svg": picture, "how": how})
    return pictures


def _head_groups(kept: dict[str, Any], source: dict[str, int]) -> list[tuple[str, int, str]]:
    """Group, units a layer and title of each picture of heads."""
    heads, kv_heads = source["num_heads"], source["num_kv_heads"]
    found = [("kv_head", kv_heads, "Key/value heads, each with its queries")] if kept.get("kv_head") else []
    if kept.get("head") and heads == kv_heads:
        found.append(("head", heads, "Attention heads"))
    elif kept.get("head"):
        largest = max((unit for units in kept["head"] for unit in units), default=0)
        if largest < heads // kv_heads:
            found.append(("head", heads // kv_heads, "Queries within each key/value group, the same in all groups"))
        else:
            found.append(("head", heads, "Query heads"))
    return found


def _by_source_layer(rows: list[list[int]], layers: list[int], num_layers: int) -> list[list[int]]:
    """A row a source layer, also where only the kept layers were listed."""
    if len(rows) == num_layers:
        return rows
    listed = dict(zip(layers, rows, strict=True))
    return [listed.get(layer, []) for layer in range(num_layers)]


def _day(seconds: float | None) -> str:
    if seconds is None:
        return report_text.ABSENT
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
