"""Numbers as a reader sees them, the same in HTML and Markdown, and the report as Markdown."""

from typing import Any

MINUS = "\u2212"
ABSENT = "\u2013"
SHAPE_NAMES = {
    "num_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_heads": "Attention heads a layer",
    "num_kv_heads": "Key/value heads a layer",
    "head_size": "Head size",
    "intermediate_size": "Intermediate size",
}
MODEL_NAMES = {
    "source": "Source",
    "pruned": "Pruned, not healed",
    "sliced": "Sliced, not healed",
    "recovered": "Result (smaller, healed)",
    "scratch": "Same shape, from nothing",
}
PROOF_NAMES = {
    "learned": "With the masks as learned",
    "exact_target": "Masks at the exact target",
    "extracted": "Extracted: the small model",
    "reloaded": "Reloaded from disk by stock software",
}
PHASE_NAMES = {
    "source": "Source training",
    "pruning": "Mask learning",
    "recovery": "Continued pretraining",
    "scratch": "Training from nothing",
}
MARKS = {"good": "\u2713", "warn": "!", "bad": "\u2715", "info": "i", "open": "\u2026"}


def nats(value: float | None) -> str:
    """A loss with three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def signed_nats(value: float | None) -> str:
    """A difference of losses, its sign always shown."""
    return ABSENT if value is None else f"{'+' if value >= 0 else MINUS}{abs(value):.3f}"


def perplexity(value: float | None) -> str:
    """Two decimals below a hundred, none above."""
    if value is None:
        return ABSENT
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as per cent."""
    return ABSENT if value is None else f"{100 * value:.{decimals}f}\u202f%"


def times(value: float | None) -> str:
    """A ratio."""
    return ABSENT if value is None else f"{value:.2f}\u00d7"


def whole(value: float | None) -> str:
    """An integer with thousands apart."""
    return ABSENT if value is None else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """A count in k, M, B or T with three digits."""
    if value is None:
        return ABSENT
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u202f{unit}"
    return f"{value:.0f}"


def byte_size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return ABSENT
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.1f}\u202f{unit}"
    return f"{value:.0f}\u202fB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes:02d}\u202fmin" if hours else f"{minutes}\u202fmin {rest:02d}\u202fs"


def units(value: float | None) -> str:
    """Expected units: whole where they are, else with a decimal or two."""
    return ABSENT if value is None else f"{value:,.2f}".rstrip("0").rstrip(".")


def forced_sentence(forced: dict[str, Any]) -> str:
    """What extraction forced in one group, in words."""
    rows = forced["units"]
    parts = [
        f"{verb} {sum(abs(change) for change in changes):,} ({', '.join(changes_of(rows, sign))})"
        for verb, sign in (("closed", -1), ("opened", 1))
        if (changes := [change for change in rows if change * sign > 0])
    ]
    return " and ".join(parts)


def uneven_rows(layers: list[dict[str, Any]]) -> list[list[str]]:
    """Heads, key/value heads and intermediate size of each layer of an uneven model; none where a half is absent."""
    keys = (("num_attention_heads", "attention"), ("num_key_value_heads", "attention"), ("intermediate_size", "mlp"))
    return [["none" if half in layer.get("skip", ()) else whole(layer[key]) for key, half in keys] for layer in layers]


def changes_of(rows: list[int], sign: int) -> list[str]:
    """The rows that lost (-1) or gained (1) units, each with how many; a shared row has no name."""
    where = [(row, abs(change)) for row, change in enumerate(rows) if change * sign > 0]
    return [f"layer {row}: {count}" for row, count in where] if len(rows) > 1 else ["of all layers"]


Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def markdown(report: dict[str, Any], slicing: list[Table] | None = None) -> str:
    """The report as Markdown: verdict and tables, without pictures. `slicing` has the tables of a run that slices."""
    verdict = report["verdict"]
    blocks = [
        f"# {report['name']}: run report",
        f"**{verdict['headline']}** {verdict['summary']}".strip(),
        markdown_table(
            ["", "Check", "Figure", "Why it matters"],
            [[MARKS[fact["level"]], fact["title"], fact["value"], fact["why"]] for fact in verdict["facts"]],
        ),
        "## Shapes",
        _shapes(report),
        *(_sheared(report) if slicing is None else _sliced(slicing)),
        "## Scores",
        _scores(report),
        "## Data use",
        _data_use(report),
        "## Stages",
        markdown_table(
            ["Stage", "State", "Time"],
            [[stage["stage"], stage["state"], duration(stage["seconds"])] for stage in report["stages"]],
        ),
        "## Provenance",
        _provenance(report),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in report["versions"].items()),
        "## Recipe",
        f"```yaml\n{report['recipe_text'].rstrip()}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _sheared(report: dict[str, Any]) -> list[str]:
    return ["## Gates", _gates(report), "## Extraction", _proof(report)]


def _sliced(tables: list[Table]) -> list[str]:
    blocks = [block for title, head, rows in tables for block in (f"### {title}", markdown_table(head, rows))]
    return ["## Slicing", *(blocks or ["Not run."])]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _shapes(report: dict[str, Any]) -> str:
    shapes = report["shapes"]
    if not shapes:
        return "Not run."
    source, target = shapes["source"], shapes["target"]
    rows = [[SHAPE_NAMES[key], whole(source.get(key)), whole(target.get(key))] for key in SHAPE_NAMES if key in source]
    counts = shapes["parameters"]
    if counts:
        rows.append(["Parameters", whole(counts.get("source")), whole(counts.get("target"))])
    tables = [markdown_table(["", "Source", "Result"], rows)]
    if uneven := (report["extraction"] or {}).get("uneven"):
        numbered = [[str(layer), *sizes] for layer, sizes in enumerate(uneven_rows(uneven))]
        tables.append(markdown_table(["Layer of the result", "Heads", "Key/value heads", "Intermediate"], numbered))
    return "\n\n".join(tables)


def _gates(report: dict[str, Any]) -> str:
    groups = (report["phases"].get("pruning") or {}).get("sparsity") or {}
    rows = [
        [
            group,
            f"layer {row}" if len(part["expected_units"]) > 1 else "all",
            whole(part["size"]),
            units(part["target_units"]),
            units(expected),
            whole(part["undecided_units"][row]),
        ]
        for group, part in groups.items()
        for row, expected in enumerate(part.get("expected_units", []))
    ]
    head = ["Group", "Where", "Units", "Target", "Expected to stay", "Undecided gates"]
    method = (report["recipe"].get("pruning") or {}).get("method", "learned")
    return (
        markdown_table(head, rows)
        if rows
        else f"None: units chosen by {method}."
        if method != "learned"
        else "Not run."
    )


def _proof(report: dict[str, Any]) -> str:
    proof = (report["extraction"] or {}).get("proof")
    if not proof:
        return "Not run."
    domains = report["domains"]
    rows = [
        [
            PROOF_NAMES[key],
            nats(proof[key].get("mean")),
            *(nats((proof[key].get("domains") or {}).get(d)) for d in domains),
        ]
        for key in PROOF_NAMES
        if key in proof
    ]
    table = markdown_table(["Loss, nats a token", "mean", *domains], rows)
    forced = (report["extraction"] or {}).get("forced") or {}
    lines = [
        f"Forced at extraction: {group}, {forced_sentence(part)}; alone {signed_nats(part['nats'])} nats a token."
        for group, part in forced.items()
    ]
    return "\n\n".join([table, *lines])


def _scores(report: dict[str, Any]) -> str:
    models = (report["scores"] or {}).get("models")
    if not models:
        return "Not run."
    domains = report["domains"]
    named = [(MODEL_NAMES.get(name, name), entry) for name, entry in models.items()]
    losses = [
        [name, nats(e.get("mean_loss")), *(nats((e.get("losses") or {}).get(d)) for d in domains)] for name, e in named
    ]
    perplexities = [[name, *(perplexity((e.get("perplexity") or {}).get(d)) for d in domains)] for name, e in named]
    sizes = [
        [
            name,
            whole(e.get("parameters")),
            whole(e.get("prunable_parameters")),
            byte_size(e.get("disk_bytes")),
            byte_size(e.get("peak_memory_bytes")),
            whole(e.get("prefill_tokens_per_s")),
            whole(e.get("decode_tokens_per_s")),
        ]
        for name, e in named
    ]
    head = ["Model", "Parameters", "Prunable", "On disk", "Peak memory", "Prefill tokens/s", "Decoding tokens/s"]
    return "\n\n".join(
        [
            markdown_table(["Loss, nats a token", "mean", *domains], losses),
            markdown_table(["Perplexity", *domains], perplexities),
            markdown_table(head, sizes),
        ]
    )


def _data_use(report: dict[str, Any]) -> str:
    rows = [
        [
            PHASE_NAMES[phase],
            d,
            whole(use["sequences"]),
            whole(use["available"]),
            times(use["epochs"]),
            percent(use["share"]),
        ]
        for phase, part in report["phases"].items()
        for d, use in part["data_use"].items()
    ]
    head = ["Phase", "Domain", "Sequences drawn", "Available", "Epochs", "Share"]
    return markdown_table(head, rows) if rows else "Not run."


def _provenance(report: dict[str, Any]) -> str:
    provenance = report["provenance"]
    if provenance["problem"]:
        return f"Unknown: {provenance['problem']}."
    rows = [
        [d, whole(e["files"]), byte_size(e["file_bytes"]), whole(e["documents"]), whole(e["malformed"])]
        for d, e in provenance["domains"].items()
    ]
    tokenizer = provenance["tokenizer"]
    sha256, vocabulary = tokenizer["sha256"], whole(tokenizer["vocab_size"])
    note = f"Corpus {provenance['fingerprint']}; tokenizer of {vocabulary} tokens, SHA-256 {sha256}."
    return markdown_table(["Domain", "Files", "Bytes", "Documents", "Malformed lines"], rows) + "\n\n" + note
