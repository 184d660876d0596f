"""Tables and figures of a study's results; they replace the marked blocks of docs/RESULTS.md and nothing else."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from study_tasks import BUDGET_SHARES, DISTILLATION_WEIGHTS, METHODS, RULES, SCRATCH_MULTIPLES

Results = dict[str, dict[str, Any]]
BLOCK = re.compile(r"(<!-- study:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_up(study: Path, docs: Path) -> None:
    """Fill the blocks of docs/RESULTS.md and draw docs/figures/study-*.svg from the results below `study`."""
    results = {
        str(path.parent.relative_to(study)): json.loads(path.read_text()) for path in study.glob("**/result.json")
    }
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    page = docs / "RESULTS.md"

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}{WRITERS[match[2]](results, docs / 'figures')}\n{match[3]}"

    page.write_text(BLOCK.sub(filled, page.read_text()))


def of_seeds(results: Results, prefix: str) -> dict[int, dict[str, Any]]:
    """seed -> result of the tasks `prefix-<seed>`."""
    pattern = re.compile(re.escape(prefix) + r"-(\d+)")
    return {int(match[1]): result for name, result in results.items() if (match := pattern.fullmatch(name))}


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, or the one value."""
    found = list(values)
    if not found:
        return "not run"
    if len(found) == 1:
        return f"{found[0]:.{digits}f}"
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def final_losses(results: Results, prefix: str) -> list[float]:
    """Mean loss over the domains, one value a seed."""
    return [result["mean_loss"] for _, result in sorted(of_seeds(results, prefix).items())]


def paired(results: Results, one: str, other: str) -> list[float]:
    """Differences `one - other` of the mean loss, seed by seed."""
    first, second = of_seeds(results, one), of_seeds(results, other)
    return [first[seed]["mean_loss"] - second[seed]["mean_loss"] for seed in sorted(first.keys() & second.keys())]


def curve(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Steps and mean loss of the evaluations on the way."""
    rows = [row for row in result["rows"] if row["kind"] == "evaluation"]
    return [row["step"] for row in rows], [statistics.mean(row["losses"].values()) for row in rows]


def excess(result: dict[str, Any]) -> list[float]:
    """Final loss above its reference, domain by domain."""
    return [result["losses"][name] - reference for name, reference in result["references"].items()]


def _figure(path: Path, draw: Callable[[Any], None], x: str, y: str) -> str:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return f"![{y} against {x}](figures/{path.name})"


def scratch_multiple(recovered: float, losses: Sequence[float], multiples: Sequence[int]) -> float | None:
    """How many times recovery's tokens a model trained from nothing needs for the loss `recovered`.

    Between budgets the loss is taken as linear in the logarithm of tokens; None where the largest budget is too small,
    and where the smallest is enough already, 1 at most.
    """
    if losses[-1] > recovered:
        return None
    for before, after in zip(range(len(losses)), range(1, len(losses)), strict=False):
        if losses[before] > recovered >= losses[after]:
            share = (losses[before] - recovered) / (losses[before] - losses[after])
            low, high = math.log(multiples[before]), math.log(multiples[after])
            return math.exp(low + share * (high - low))
    return float(multiples[0])


def _scratch(results: Results, figures: Path) -> str:
    sheared = of_seeds(results, "train/static")
    fresh = {multiple: of_seeds(results, f"train/scratch-{multiple}x") for multiple in SCRATCH_MULTIPLES}
    seeds = sorted(set(sheared).intersection(*fresh.values()))
    rows = [("sheared, recovered", "1", spread(sheared[seed]["mean_loss"] for seed in seeds))]
    rows += [
        (f"from scratch, {multiple}x", f"{multiple}", spread(fresh[multiple][seed]["mean_loss"] for seed in seeds))
        for multiple in SCRATCH_MULTIPLES
    ]
    needed = [
        scratch_multiple(
            sheared[seed]["mean_loss"], [fresh[m][seed]["mean_loss"] for m in SCRATCH_MULTIPLES], SCRATCH_MULTIPLES
        )
        for seed in seeds
    ]
    if not seeds:
        return "not run"
    known = [value for value in needed if value is not None]
    most = SCRATCH_MULTIPLES[-1]
    said = f"{spread(known, 1)} times recovery's tokens" if known else f"more than {most} times recovery's tokens"
    if known and len(known) < len(needed):
        said += f" in {len(known)} of {len(needed)} seeds, more than {most} times in the others"

    def draw(axes: Any) -> None:
        for seed in seeds:
            axes.plot(
                SCRATCH_MULTIPLES,
                [fresh[m][seed]["mean_loss"] for m in SCRATCH_MULTIPLES],
                "o-",
                color="C1",
                label="from scratch" if seed == seeds[0] else None,
            )
            axes.axhline(sheared[seed]["mean_loss"], color="C0", label="sheared" if seed == seeds[0] else None)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SCRATCH_MULTIPLES, [f"{m}x" for m in SCRATCH_MULTIPLES])

    picture = _figure(figures / "study-scratch.svg", draw, "tokens, in recovery's", "loss, nats a token")
    head = ("model", "tokens, in recovery's", "mean loss, nats a token")
    return f"{table(head, rows)}\n\nFrom scratch, the recovered loss takes {said}.\n\n{picture}"


def _mixture(results: Results, figures: Path) -> str:
    rows, names = [], ("static", *RULES)
    for rule in names:
        found = of_seeds(results, f"train/{rule}").values()
        rows.append(
            (
                f"`{rule}`",
                spread(result["mean_loss"] for result in found),
                spread(paired(results, f"train/{rule}", "train/static"), 4) if rule != "static" else "",
                spread(statistics.mean(excess(result)) for result in found),
                spread(statistics.pstdev(excess(result)) for result in found),
                spread(max(excess(result)) for result in found),
            )
        )

    def draw(axes: Any) -> None:
        for position, rule in enumerate(names):
            for result in of_seeds(results, f"train/{rule}").values():
                axes.plot([position] * len(excess(result)), excess(result), "o", color=f"C{position}", alpha=0.35)
        axes.set_xticks(range(len(names)), names, rotation=20)

    picture = _figure(figures / "study-mixture.svg", draw, "rule", "loss - reference by domain")
    head = ("rule", "mean loss", "against static, paired", "mean excess", "spread over domains", "largest excess")
    return f"{table(head, rows)}\n\n{picture}"


def _budget(results: Results, figures: Path) -> str:
    names = {share: f"budget-{round(100 * share)}" for share in BUDGET_SHARES}
    rows = [
        (
            f"{100 * share:.0f} %",
            spread(final_losses(results, f"prune/{name}")),
            spread(final_losses(results, f"train/{name}")),
        )
        for share, name in names.items()
    ]

    def draw(axes: Any) -> None:
        for seed in sorted(of_seeds(results, f"train/{names[BUDGET_SHARES[0]]}")):
            found = [of_seeds(results, f"train/{name}").get(seed) for name in names.values()]
            axes.plot(BUDGET_SHARES, [r["mean_loss"] if r else math.nan for r in found], "o-", label=f"seed {seed}")

    picture = _figure(figures / "study-budget.svg", draw, "share of all steps for mask learning", "recovered loss")
    return f"{table(('mask learning', 'pruned', 'recovered'), rows)}\n\n{picture}"


def _cofi(results: Results, _figures: Path) -> str:
    rows = []
    for name, task, recovered in (("targeted", "learned", "static"), ("CoFi", "cofi", "cofi")):
        pruned = of_seeds(results, f"prune/{task}")
        speeds = {kind: [] for kind in ("prefill", "decode")}  # type: dict[str, list[float]]
        for seed, measured in of_seeds(results, "speed/cofi").items():
            for kind, values in speeds.items():
                rate = measured["speeds"]
                values.append(rate[f"prune/{task}-{seed}"][kind] / rate["source"][kind])
        rows.append(
            (
                name,
                spread((result["parameters"] for result in pruned.values()), 0),
                spread(final_losses(results, f"prune/{task}")),
                spread(final_losses(results, f"train/{recovered}")),
                spread(speeds["prefill"], 2),
                spread(speeds["decode"], 2),
            )
        )
    head = ("", "parameters", "pruned", "recovered", "prefill / source", "decode / source")
    return table(head, rows)


def _method(results: Results, _figures: Path) -> str:
    rows = []
    for method in ("learned", *METHODS):
        recovered = "static" if method == "learned" else method
        rows.append(
            (
                f"`{method}`",
                spread(final_losses(results, f"prune/{method}")),
                spread(final_losses(results, f"train/{recovered}")),
                spread(paired(results, f"train/{recovered}", "train/static"), 4) if method != "learned" else "",
                _least(results, f"prune/{method}", "choosing_s"),
            )
        )
    return table(("method", "pruned", "recovered", "against learned, paired", "seconds to choose, least"), rows)


def _distillation(results: Results, _figures: Path) -> str:
    rows = [
        ("cross-entropy", spread(final_losses(results, "train/static")), "", _least(results, "train/static", "seconds"))
    ]
    for weight in DISTILLATION_WEIGHTS:
        name = f"train/distilled-{weight:g}"
        rows.append(
            (
                f"distillation, weight {weight:g}",
                spread(final_losses(results, name)),
                spread(paired(results, name, "train/static"), 4),
                _least(results, name, "seconds"),
            )
        )
    return table(("recovery by", "mean loss", "against cross-entropy, paired", "seconds, least"), rows)


def _loss_from(results: Results, figures: Path) -> str:
    names = {"eval": "train/sheared", "train": "train/sheared-train"}
    rows = [
        (
            f"`{kind}`",
            spread(final_losses(results, name)),
            _evaluation_share(results, name),
            _least(results, name, "seconds"),
        )
        for kind, name in names.items()
    ]

    def draw(axes: Any) -> None:
        for style, (kind, name) in zip(("-", "--"), names.items(), strict=True):
            for result in list(of_seeds(results, name).values())[:1]:
                steps = [row for row in result["rows"] if row["kind"] == "step"]
                for number, domain in enumerate(steps[0]["proportions"]):
                    axes.plot(
                        [row["step"] for row in steps],
                        [row["proportions"][domain] for row in steps],
                        style,
                        color=f"C{number}",
                        label=domain if kind == "eval" else None,
                    )

    picture = _figure(figures / "study-loss-from.svg", draw, "step", "proportion (solid eval, dashed train)")
    return f"{table(('loss from', 'mean loss', 'time in evaluations', 'seconds, least'), rows)}\n\n{picture}"


def _least(results: Results, prefix: str, key: str) -> str:
    """Of all seeds: what else the machine did only ever adds to the time."""
    seconds = [result[key] for result in of_seeds(results, prefix).values()]
    return spread([min(seconds)] if seconds else [], 0)


def _evaluation_share(results: Results, prefix: str) -> str:
    shares = []
    for result in of_seeds(results, prefix).values():
        spent = sum(row["seconds"] for row in result["rows"] if row["kind"] == "evaluation")
        steps = sum(row["step_s"] for row in result["rows"] if row["kind"] == "step")
        shares.append(100 * spent / (spent + steps))
    return spread(shares, 1) + " %"


WRITERS: dict[str, Callable[[Results, Path], str]] = {
    "scratch": _scratch,
    "mixture": _mixture,
    "budget": _budget,
    "cofi": _cofi,
    "method": _method,
    "distillation": _distillation,
    "loss_from": _loss_from,
}
