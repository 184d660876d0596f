"""A comparison as one HTML page, and its charts."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator import report_comparison_text as text
from orchestrator.report_charts import INK, axis_label, colour_of, middle_chart, spread
from orchestrator.report_page import page_environment
from orchestrator.report_text import compact, duration, nats

MARKERS = ("o", "s", "^")
"""Of the first eight methods, of the next eight, and so on: colours repeat."""


def comparison_page(found: dict[str, Any]) -> str:
    """The whole page, self-contained as a run's report is."""
    tables = {
        "before": text.loss_table(found, "before"),
        "after": text.loss_table(found, "after"),
        "size": text.size_table(found),
        "cost": text.cost_table(found),
    }
    template = page_environment().get_template("report_comparison.html.j2")
    return template.render(found=found, tables=tables, figures=charts(found), protocol=text.protocol_in_words(found))


def charts(found: dict[str, Any]) -> dict[str, str]:
    """Loss against size before and after recovery, and against the time spent."""
    methods = found["methods"]

    def size(method: dict[str, Any]) -> float:
        return float(method["nonzero_parameters"])

    def time(method: dict[str, Any]) -> float:
        return float(sum(method["seconds"].values()))

    figures = {}
    if any(method["before"] for method in methods):
        figures["before"] = _chart("size-before", found, "before", (size, "parameters that are not zero", _short))
    figures["after"] = _chart("size-after", found, "after", (size, "parameters that are not zero", _short))
    figures["time"] = _chart("time-after", found, "after", (time, "time spent on choosing and recovery", duration))
    return figures


def _short(value: float) -> str:
    return compact(value).replace("\u202f", "")


def _chart(
    key: str,
    found: dict[str, Any],
    moment: str,
    axis: tuple[Callable[[dict[str, Any]], float], str, Callable[[float], str]],
) -> str:
    """Mean loss against one quantity, a mark a method, named at the right in the order of losses; the source dashed."""
    place, label, shown = axis

    def draw(axes: Axes) -> None:
        ends = [(f"source {nats(found['source']['mean_loss'])}", found["source"]["mean_loss"], INK)]
        for index, method in enumerate(found["methods"]):
            entry = method[moment]
            if entry is None:
                continue
            colour, marker = colour_of(index), MARKERS[index // 8 % len(MARKERS)]
            axes.plot([place(method)], [entry["mean_loss"]], marker, color=colour, markersize=5, clip_on=False)
            ends.append((f"{method['title']} {nats(entry['mean_loss'])}", entry["mean_loss"], colour))
        axes.axhline(found["source"]["mean_loss"], color=INK, linestyle=(0, (3, 2)), linewidth=1.0)
        axes.margins(x=0.08, y=0.1)
        low, high = axes.get_ylim()
        for (name, _, colour), y in zip(ends, spread([y for _, y, _ in ends], 0.075 * (high - low)), strict=True):
            axis_label(axes, y, name, colour)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label, loc="right", labelpad=1)
        axes.set_ylabel("nats a token")

    return middle_chart(key, draw, f"Mean held-out loss {moment} recovery against {label}")
