"""Pictures of which units were kept, as small SVG that takes its colours from the page."""

from collections.abc import Iterable

CELL, GAP, LEFT, RIGHT = 15, 4, 64, 92
STRIP_WIDTH, STRIP_HEIGHT = 640.0, 12
MOST_BINS = 256
LEVELS = 5


def cell_grid(kept: list[list[int]], size: int, kept_layers: list[int], label: str) -> str:
    """Layers down, units across, a cell each: filled where kept, outlined where removed, struck out with its layer."""
    width, height = LEFT + size * (CELL + GAP) + RIGHT, len(kept) * (CELL + GAP) + 4
    parts = []
    for layer, units in enumerate(kept):
        top = layer * (CELL + GAP) + 2
        alive = layer in kept_layers
        parts.append(_text(LEFT - 10, top + CELL - 4, f"layer {layer}", "end"))
        chosen = set(units) if alive else set()
        for unit in range(size):
            left = LEFT + unit * (CELL + GAP)
            name = "kept" if unit in chosen else "cut"
            parts.append(f'<rect class="{name}" x="{left}" y="{top}" width="{CELL}" height="{CELL}" rx="2.5"/>')
        right = LEFT + size * (CELL + GAP)
        if not alive:
            middle = top + CELL / 2
            parts.append(f'<path class="struck" d="M{LEFT - 3} {middle}H{right - 1}"/>')
        parts.append(_text(right + 6, top + CELL - 4, f"{len(chosen)} of {size}" if alive else "removed", "start"))
    return _svg(width, height, parts, label)


def strips(kept: list[list[int]], size: int, kept_layers: list[int] | None, label: str) -> str:
    """One strip a row, a line each unit: dark where kept. Many units share a line, its shade their kept share.

    Args:
        kept: Kept unit ids of each row.
        size: Units of a row.
        kept_layers: Rows that remain; None where a single row is drawn without a name.
        label: Read aloud.
    """
    named = kept_layers is not None
    left, right = (LEFT, RIGHT) if named else (0, 0)
    row_height = STRIP_HEIGHT if named else 3 * STRIP_HEIGHT
    parts = []
    for row, units in enumerate(kept):
        top = row * (row_height + GAP) + 2
        alive = kept_layers is None or row in kept_layers
        parts.append(f'<rect class="bed" x="{left}" y="{top}" width="{STRIP_WIDTH:.0f}" height="{row_height}"/>')
        if alive:
            parts += _bars(units, size, left, top, row_height)
        if named:
            parts.append(_text(left - 10, top + row_height - 2, f"layer {row}", "end"))
            if not alive:
                parts.append(f'<path class="struck" d="M{left} {top + row_height / 2}h{STRIP_WIDTH:.0f}"/>')
            count = f"{len(units)} of {size}" if alive else "removed"
            parts.append(_text(left + STRIP_WIDTH + 6, top + row_height - 2, count, "start"))
    height = len(kept) * (row_height + GAP) + 2
    return _svg(left + STRIP_WIDTH + right, height, parts, label)


def heat(columns: list[list[float]], label: str) -> str:
    """A row a layer, time from left to right, the darker the larger the share (0 to 1) of the layer's units kept."""
    parts = []
    width = STRIP_WIDTH / len(columns)
    for row in range(len(columns[0])):
        top = row * (STRIP_HEIGHT + GAP) + 2
        shades = [round(2 * LEVELS * column[row]) for column in columns]
        parts.append(f'<rect class="bed" x="{LEFT}" y="{top}" width="{STRIP_WIDTH:.0f}" height="{STRIP_HEIGHT}"/>')
        for shade in sorted({shade for shade in shades if shade > 0}):
            runs = "".join(
                f"M{LEFT + start * width:.1f} {top}h{(stop - start) * width:.1f}v{STRIP_HEIGHT}"
                f"H{LEFT + start * width:.1f}z"
                for start, stop in _runs(shades, shade)
            )
            parts.append(f'<path class="kept" opacity="{shade / (2 * LEVELS):g}" d="{runs}"/>')
        parts.append(_text(LEFT - 10, top + STRIP_HEIGHT - 2, f"layer {row}", "end"))
        share = f"{100 * columns[-1][row]:.0f} % kept"
        parts.append(_text(LEFT + STRIP_WIDTH + 6, top + STRIP_HEIGHT - 2, share, "start"))
    height = len(columns[0]) * (STRIP_HEIGHT + GAP) + 2
    return _svg(LEFT + STRIP_WIDTH + RIGHT, height, parts, label)


def _bars(units: Iterable[int], size: int, left: float, top: float, height: float) -> list[str]:
    bins = size if size <= STRIP_WIDTH * 1.5 else MOST_BINS
    kept, members = [0] * bins, [0] * bins
    for unit in range(size):
        members[unit * bins // size] += 1
    for unit in units:
        kept[unit * bins // size] += 1
    shades = [round(LEVELS * k / m) for k, m in zip(kept, members, strict=True)]
    paths = []
    for shade in range(1, LEVELS + 1):
        runs = "".join(
            f"M{left + start * STRIP_WIDTH / bins:.2f} {top}h{(stop - start) * STRIP_WIDTH / bins:.2f}v{height}"
            f"H{left + start * STRIP_WIDTH / bins:.2f}z"
            for start, stop in _runs(shades, shade)
        )
        if runs:
            paths.append(f'<path class="kept" opacity="{shade / LEVELS:g}" d="{runs}"/>')
    return paths


def _runs(shades: list[int], shade: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for position, value in enumerate(shades):
        if value != shade:
            continue
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _svg(width: float, height: float, parts: list[str], label: str) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" style="width:{width:g}px"'
    return f'<svg class="units" role="img" aria-label="{label}" {box}>{"".join(parts)}</svg>'
