"""A comparison as tables of text, the same in HTML and Markdown."""

from typing import Any

from orchestrator.report_text import (
    ABSENT,
    byte_size,
    compact,
    duration,
    markdown_table,
    nats,
    perplexity,
    signed_nats,
    whole,
)

NOISE = (
    "± is one standard error of the difference, sequence by sequence, from the held-out sequences alone; what another "
    "seed of training would change is not in it."
)


def loss_table(found: dict[str, Any], moment: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of losses and perplexities before or after recovery, the best first."""
    text = any((method[moment] or {}).get("text") for method in found["methods"])
    tasks = task_names(found)
    head = ["Method", "mean loss", "to the source", *(f"{domain}, perplexity" for domain in found["domains"])]
    head += ["text, perplexity"] * text + tasks
    known = sorted((m for m in found["methods"] if m[moment]), key=lambda m: m[moment]["mean_loss"])
    named = [("source", found["source"], ABSENT), *((m["title"], m[moment], _apart(m[moment])) for m in known)]
    rows = []
    for title, entry, apart in named:
        row = [title, nats(entry["mean_loss"]), apart, *(perplexity(p) for p in entry["perplexity"].values())]
        row += [perplexity(entry["text"]["perplexity"])] if text else []
        rows.append(row + [task_score(entry, task) for task in tasks])
    return head, rows


def _apart(entry: dict[str, Any]) -> str:
    error = entry["to_source"]["standard_error"]
    return f"{signed_nats(entry['to_source']['nats'])} ± {ABSENT if error is None else f'{error:.3f}'}"


def task_names(found: dict[str, Any]) -> list[str]:
    """The harness tasks that were scored."""
    return list((found["source"].get("tasks") or {}).get("tasks", {}))


def task_score(entry: dict[str, Any], task: str) -> str:
    """The first metric of a task, with its standard error where the harness gives one."""
    for name, metric in entry["tasks"]["tasks"][task]["metrics"].items():
        error = metric["stderr"]
        return f"{name} {metric['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return ABSENT


def size_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of sizes, memory and speeds of the source and of every result."""
    head = ["Model", "parameters", "not zero", "on disk", "peak memory", "prefill, tokens/s", "decoding, tokens/s"]
    named = [("source", found["source"]), *((method["title"], method) for method in found["methods"])]
    return head, [
        [
            title,
            whole(entry["parameters"]),
            whole(entry["nonzero_parameters"]),
            byte_size(entry["disk_bytes"]),
            byte_size(entry["peak_memory_bytes"]),
            f"{whole(entry['prefill_tokens_per_s'])} ({ratio(entry, found['source'], 'prefill')})",
            f"{whole(entry['decode_tokens_per_s'])} ({ratio(entry, found['source'], 'decode')})",
        ]
        for title, entry in named
    ]


def ratio(entry: dict[str, Any], source: dict[str, Any], kind: str) -> str:
    """Tokens a second as a multiple of the source's."""
    return f"{entry[f'{kind}_tokens_per_s'] / source[f'{kind}_tokens_per_s']:.2f}×"


def cost_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of time and tokens that every method took."""
    head = ["Method", "calibration, tokens", "mask learning, tokens", "recovery, tokens", "choosing", "recovery"]
    return head, [
        [
            method["title"],
            *(compact(method["tokens"][kind]) for kind in ("calibration", "mask_learning", "recovery")),
            *(duration(method["seconds"][kind]) for kind in ("choosing", "recovery")),
        ]
        for method in found["methods"]
    ]


def protocol_in_words(found: dict[str, Any]) -> str:
    """How everything was measured."""
    protocol, text = found["protocol"], found["source"].get("text")
    words = (
        f"Losses: {protocol['sequences_per_domain']} sequences of {protocol['sequence_tokens']} tokens a domain at "
        f"most, of the split {protocol['split']}, which no training read; {protocol['windows']}; "
        f"{protocol['bos_rule']}; mean over domains, each counting the same; weights in {protocol['dtype']}. {NOISE} "
        f"Speed: {protocol['load_batch_sequences']} × {protocol['prompt_tokens']} prompt tokens, then "
        f"{protocol['decode_tokens']} written with a key-value cache; median of {protocol['repeats']} rounds in which "
        f"all models take turns in one process, on {protocol['device']} with {protocol['threads']} threads; weights "
        "with zeros are multiplied as dense ones."
    )
    if tasks := found["source"].get("tasks"):
        rules = tasks["protocol"]
        shots = "as each task says" if rules["fewshot"] is None else rules["fewshot"]
        limit = "all" if rules["limit"] is None else f"the first {rules['limit']:,}"
        words += f" Tasks: {rules['harness']}, {limit} questions of each, solved examples before each: {shots}."
    if text:
        said = text["protocol"]
        words += f" Text: {said['file']}; {said['window_rule']}; {said['bos_rule']}."
    return words


def comparison_markdown(found: dict[str, Any]) -> str:
    """The page as Markdown, without pictures."""
    blocks = [f"# {found['name']}: methods compared", found["verdict"]]
    blocks += ["## Before recovery", markdown_table(*loss_table(found, "before"))]
    blocks += ["## After recovery", markdown_table(*loss_table(found, "after"))]
    blocks += ["## Size and speed", markdown_table(*size_table(found))]
    blocks += ["## Time and tokens", markdown_table(*cost_table(found))]
    if found["failed"]:
        rows = [[name, " ".join(problems)] for name, problems in found["failed"].items()]
        blocks += ["## Failed", markdown_table(["Method", "Why"], rows)]
    return "\n\n".join([*blocks, protocol_in_words(found)]) + "\n"
