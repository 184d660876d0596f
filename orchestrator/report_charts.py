"""Line and area charts of a run as SVG that lives inside a page: it takes colours and fonts from the page's style."""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.report_text import compact, nats

# Colours are drawn as stand-ins and then replaced by the page's variables, so that they follow light and dark.
STAND_INS = {"#0a0b01": "ink", "#0a0b02": "soft", "#0a0b03": "rule", "#0a0b04": "paper", "#0a0b05": "mark"}
STAND_INS |= {f"#0d0e{i:02x}": f"d{i}" for i in range(8)}
INK, SOFT, RULE, _PAPER, MARK = list(STAND_INS)[:5]
DOMAIN_COLOURS = list(STAND_INS)[5:]
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1, 1)))
MOST_CHART_POINTS = 240
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


def colour_of(index: int) -> str:
    """The colour of the n-th domain; they repeat after eight, told apart by `dash_of`."""
    return DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]


def dash_of(index: int) -> Any:
    """The dash pattern of the n-th domain."""
    return DASHES[index // len(DOMAIN_COLOURS) % len(DASHES)]


def small_chart(key: str, draw: Callable[[Axes], None], label: str) -> str:
    """One panel of a row of small ones."""
    return draw_svg(key, (300, 168), draw, label)


def middle_chart(key: str, draw: Callable[[Axes], None], label: str) -> str:
    """One of two charts side by side, or a chart that stands alone."""
    return draw_svg(key, (460, 225), draw, label)


def draw_svg(key: str, size: tuple[float, float], draw: Callable[[Axes], None], label: str) -> str:
    """Draw on one pair of axes, `size` in points. `key` makes its ids unique in the page; `label` is read aloud."""
    settings: Any = {**STYLE, "svg.hashsalt": key}
    with matplotlib.rc_context(settings):
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return page_svg(out.getvalue(), key, label)


def page_svg(svg: str, key: str, label: str) -> str:
    """An SVG file made part of a page: no prologue, own ids, the page's fonts and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg)
    svg = re.sub(r"font: (?:[\w.]+ )*?([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"<[^>]+>", _shorten, svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", svg)
    svg = re.sub(r'<svg height="[^"]*"', "<svg", re.sub(r'( width| height)="[\d.]+pt"', "", svg, count=2))
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1).strip()


def _shorten(tag: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: half the file. Text between tags keeps its digits."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def points(xs: list[Any], ys: list[Any]) -> tuple[list[float], list[float]]:
    """The pairs that are known, thinned for drawing, the last one kept."""
    known = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    every = max(1, len(known) // MOST_CHART_POINTS)
    chosen = known[::every] + ([known[-1]] if known and (len(known) - 1) % every else [])
    return [x for x, _ in chosen], [y for _, y in chosen]


@contextmanager
def _steps_axis(axes: Axes, label: str = "step") -> Iterator[None]:
    yield
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x).replace("\u202f", "")))
    axes.set_xlabel(label, loc="right", labelpad=1)
    axes.margins(x=0.0)


def sparsity_chart(key: str, group: str, part: dict[str, Any]) -> str:
    """Expected sparsity of one group against its target over steps."""
    series = part["sparsity"][group]

    def draw(axes: Axes) -> None:
        with _steps_axis(axes):
            axes.plot(*points(part["steps"], series["target"]), color=SOFT, linestyle=(0, (3, 2)), linewidth=1.2)
            axes.plot(*points(part["steps"], series["expected"]), color=MARK)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        axes.set_ylim(bottom=0)

    return small_chart(key, draw, f"Sparsity of {group} over steps, with its target")


def domain_loss_chart(key: str, domain: str, index: int, evaluations: dict[str, Any]) -> str:
    """Held-out loss of one domain over steps, with its reference."""
    references = evaluations["references"].get(domain) or []

    def draw(axes: Axes) -> None:
        with _steps_axis(axes):
            xs, ys = points(evaluations["steps"], evaluations["losses"][domain])
            marker = "o" if len(xs) <= 30 else None
            axes.plot(xs, ys, color=colour_of(index), marker=marker, markersize=3, clip_on=False)
            known = points(evaluations["steps"], references) if references else ([], [])
            if known[0]:
                axes.plot(*known, color=SOFT, linestyle=(0, (3, 2)), linewidth=1.2)
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(4))

    return small_chart(key, draw, f"Held-out loss of {domain} over steps")


def proportions_chart(key: str, domains: list[str], part: dict[str, Any]) -> str:
    """Proportions over steps, a line a domain."""

    def draw(axes: Axes) -> None:
        ends = []
        with _steps_axis(axes):
            for index, domain in enumerate(domains):
                xs, ys = points(part["steps"], part["proportions"].get(domain) or [None] * len(part["steps"]))
                if ys:
                    style = {"color": colour_of(index), "linestyle": dash_of(index), "drawstyle": "steps-post"}
                    axes.plot(xs, ys, **style)
                    ends.append((domain, ys[-1]))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        _end_labels(axes, ends, domains)

    return middle_chart(key, draw, "Proportions of the domains over steps")


def drawn_chart(key: str, domains: list[str], part: dict[str, Any]) -> str:
    """Cumulative sequences drawn from each domain over steps."""

    def draw(axes: Axes) -> None:
        ends = []
        with _steps_axis(axes):
            for index, domain in enumerate(domains):
                xs, ys = points(part["steps"], part["drawn"].get(domain, [None] * len(part["steps"])))
                if ys:
                    axes.plot(xs, ys, color=colour_of(index), linestyle=dash_of(index))
                    ends.append((domain, ys[-1]))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y).replace("\u202f", "")))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _end_labels(axes, ends, domains)

    return middle_chart(key, draw, "Cumulative sequences drawn from each domain")


def comparison_chart(key: str, curves: dict[str, tuple[list[Any], list[Any]]], source_loss: float | None) -> str:
    """Mean held-out loss over training tokens: the healed model and the one from nothing, with the source's loss."""
    colours = [MARK, SOFT]

    def draw(axes: Axes) -> None:
        ends = []
        with _steps_axis(axes, "training tokens"):
            for colour, (name, (xs, ys)) in zip(colours, curves.items(), strict=False):
                known = points(xs, ys)
                axes.plot(*known, color=colour, marker="o", markersize=3)
                ends.append((name, known[1][-1], colour))
            if source_loss is not None:
                axes.axhline(source_loss, color=INK, linestyle=(0, (3, 2)), linewidth=1.0)
                ends.append((f"source {nats(source_loss)}", source_loss, INK))
        low, high = _frame([points(*curve)[1] for curve in curves.values()], source_loss)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        for (name, _, colour), y in zip(ends, spread([y for _, y, _ in ends], 0.07 * (high - low)), strict=True):
            axis_label(axes, y, name, colour)
        axes.set_ylabel("nats a token")

    return middle_chart(key, draw, "Mean held-out loss over training tokens")


def _frame(curves: list[list[float]], source_loss: float | None) -> tuple[float, float]:
    """Heights that show where curves end; a model from nothing begins far above, and would press the rest flat."""
    known = [loss for curve in curves for loss in curve] + ([] if source_loss is None else [source_loss])
    low = min(known)
    top = max(*curves[0], *(curve[-1] for curve in curves))
    top = min(low + 2 * (top - low), max(known))
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + margin


def _end_labels(axes: Axes, ends: list[tuple[str, float]], domains: list[str]) -> None:
    gap = 0.065 * axes.get_ylim()[1]
    for (domain, _), y in zip(ends, spread([y for _, y in ends], gap, floor=gap / 2), strict=True):
        axis_label(axes, y, domain, colour_of(domains.index(domain)))


def axis_label(axes: Axes, y: float, text: str, colour: str) -> None:
    """Name what ends at a height, at the right of the axes."""
    place = axes.get_yaxis_transform()
    axes.text(1.012, y, text, color=colour, transform=place, va="center", fontsize=9)


def spread(heights: list[float], gap: float, floor: float = -math.inf) -> list[float]:
    """The heights moved apart to at least `gap` and not below `floor`, their order kept, as little as passes need."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(200):
        moved = placed[order[0]] < floor if order else False
        if moved:
            placed[order[0]] = floor
        for below, above in itertools.pairwise(order):
            short = gap - (placed[above] - placed[below])
            if short > 1e-9 * max(gap, 1.0):
                placed[below] -= short / 2
                placed[above] += short / 2
                moved = True
        if not moved:
            break
    return placed
