"""Plots in characters: curves in braille dots, bars in blocks, heatmaps in shades; plain ASCII where need be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.cells import cell_len, set_cell_size

from tunesmith.core.report import Plot
from tunesmith.report import bars, heatmap
from tunesmith.report.curves import Axis, Curve, curves, smooth, x_axis, y_axis
from tunesmith.report.text import visible
from tunesmith.report.units import number

_ROWS, _MOST_ROWS = 9, 24
_MARKS = "ox+*#@%&"
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
# The dots of a braille character by (column, row), as bits above U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw(plot: Plot, width: int, ascii_only: bool) -> list[str]:
    """The lines of the picture, none wider than `width` cells; empty where there is nothing to draw."""
    if plot.kind == "bar":
        return _bars(plot, width, ascii_only)
    if plot.kind == "heatmap":
        return _heatmap(plot, width, ascii_only)
    return _lines(plot, width, ascii_only)


def _lines(plot: Plot, width: int, ascii_only: bool) -> list[str]:
    found, categories = curves(plot)
    if not any(curve.finite.any() for curve in found):
        return []
    up = y_axis(found, plot.y_scale, plot.unit, 3)
    across = x_axis(found, categories, plot.x_scale, max(width // 12, 2))
    margin = max(cell_len(label) for _, label in up.ticks) + 1
    columns = width - margin - 1
    if columns < 10:
        return []
    cells = [[" "] * columns for _ in range(_ROWS)]
    legend = []
    # The first curve is the one line of dots; what is drawn over it is marked by letters that tell it apart.
    for i, curve in enumerate(found):
        shown = replace(curve, ys=smooth(curve.ys)) if curve.style == "smooth" else curve
        if i == 0 and curve.style != "points" and len(curve.xs) > 2:
            _dots(cells, shown, across, up, ascii_only)
            legend.append(
                f"{'.' if ascii_only else '⠒'} {curve.label}{', averaged' if curve.style == 'smooth' else ''}"
            )
        else:
            mark = _MARKS[i % len(_MARKS)]
            _marks(cells, shown, across, up, mark)
            legend.append(f"{mark} {curve.label}")
    bar, corner, flat = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    labels = {_row(float(up.place(np.array(value)))): label for value, label in up.ticks}
    drawn = [f"{labels.get(i, ''):>{margin}}{bar}{''.join(row)}" for i, row in enumerate(cells)]
    below = f"{' ' * margin}{corner}{flat * columns}"
    named = " by ".join(filter(None, (plot.y, plot.x)))
    return [named, *drawn, below, " " * (margin + 1) + _x_labels(across, columns), "   ".join(legend)]


def _row(share: float) -> int:
    return min(max(round((1 - share) * (_ROWS - 1)), 0), _ROWS - 1)


def _dots(cells: list[list[str]], curve: Curve, across: Axis, up: Axis, ascii_only: bool) -> None:
    known = curve.finite
    if not known.any():
        return
    columns = len(cells[0])
    xs = across.place(curve.xs[known]) * (2 * columns - 1)
    ys = (1 - up.place(curve.ys[known])) * (4 * _ROWS - 1)
    first, last = math.ceil(xs[0]), math.floor(xs[-1])
    where = np.arange(first, max(last, first) + 1)
    heights = np.interp(where, xs, ys).round().astype(int)
    bits = np.zeros((_ROWS, columns), dtype=int)
    before = heights[0]
    for x, y in zip(where.tolist(), heights.tolist(), strict=True):
        # Steep parts are joined, half by each neighbour.
        for dot in range(min(y, before), max(y, before) + 1):
            bits[min(max(dot, 0), 4 * _ROWS - 1) // 4, min(x, 2 * columns - 1) // 2] |= _DOTS[x % 2][dot % 4]
        before = y
    for i, j in np.argwhere(bits).tolist():
        cells[i][j] = "." if ascii_only else chr(0x2800 + int(bits[i, j]))


def _marks(cells: list[list[str]], curve: Curve, across: Axis, up: Axis, mark: str) -> None:
    columns = len(cells[0])
    known = np.flatnonzero(curve.finite)
    if len(known) == 0:
        return
    # A curve of many points is marked at about every fourth column.
    chosen = known[np.unique(np.linspace(0, len(known) - 1, max(columns // 4, 2)).round().astype(int))]
    xs = (across.place(curve.xs[chosen]) * (columns - 1)).round().astype(int)
    for x, share in zip(xs.tolist(), up.place(curve.ys[chosen]).tolist(), strict=True):
        cells[_row(share)][x] = mark


def _x_labels(axis: Axis, columns: int) -> str:
    line = " " * columns
    taken = -1
    for value, label in axis.ticks:
        shown = visible(label).replace("\n", " ")
        size = cell_len(shown)
        at = round(float(axis.place(np.array(value))) * (columns - 1)) - size // 2
        at = min(max(at, 0), columns - size)
        if at > taken:
            line = line[:at] + shown + line[at + size :]
            taken = at + size
    return line


def _bars(plot: Plot, width: int, ascii_only: bool) -> list[str]:
    categories = bars.names(plot)
    values = {label: dict(zip(map(str, xs), ys, strict=True)) for label, (xs, ys) in plot.series.items()}
    shown = categories[: bars.MOST_CATEGORIES]
    several = max(map(cell_len, map(visible, values)), default=0) if len(values) > 1 else 0
    several = min(several, width // 5)
    left = min(max(map(cell_len, map(visible, shown)), default=0), width // 3)
    told = {place: text for place, text in bars.texts(plot).items() if place[0] in shown}
    room = width - left - several - max(map(len, told.values()), default=0) - 4
    largest = max((abs(values[s][c]) for c, s in told if math.isfinite(values[s][c])), default=0.0)
    if room < 4 or not told:
        return []
    lines = [plot.y] if plot.y else []
    for category in shown:
        name = category
        for label, held in values.items():
            if category not in held:
                continue
            value = held[category]
            share = abs(value) / largest if math.isfinite(value) and largest else 0.0
            head = set_cell_size(visible(name).replace("\n", " "), left)
            if several:
                head += " " + set_cell_size(visible(label).replace("\n", " "), several)
            lines.append(f"{head} {_bar(share, room, ascii_only)} {told[category, label]}")
            name = ""
    more = len(categories) - len(shown)
    return [*lines, f"and {more} more"] if more > 0 else lines


def _bar(share: float, room: int, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * room)
    eighths = round(share * room * 8)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


def _heatmap(plot: Plot, width: int, ascii_only: bool) -> list[str]:
    values, rows, columns = heatmap.shrink(plot)
    known = np.isfinite(values)
    if not known.any():
        return []
    left = min(max(map(cell_len, map(visible, rows))), width // 4)
    texts = heatmap.cell_texts(plot, values)
    wide = max(max(len(t) for row in texts for t in row), max(map(cell_len, map(visible, columns)))) + 1
    names = [set_cell_size(visible(name).replace("\n", " "), left) for name in rows]
    if left + wide * len(columns) <= width:
        head = " " * left + "".join(f"{' ' * (wide - cell_len(visible(c)))}{visible(c)}" for c in columns)
        return [head, *(n + "".join(t.rjust(wide) for t in row) for n, row in zip(names, texts, strict=True))]
    shades = _ASCII_SHADES if ascii_only else _SHADES
    low, high = float(values[known].min()), float(values[known].max())
    span = high / 2 - low / 2 or 1.0
    step, down = math.ceil(len(columns) / max(width - left - 1, 1)), math.ceil(len(names) / _MOST_ROWS)
    lines = []
    for name, row in zip(names[::down], values[::down, ::step], strict=True):
        lines.append(f"{name} {''.join(_shade(float(v), low, span, shades) for v in row)}")
    first, last = number(low, plot.unit), number(high, plot.unit)
    return [*lines, f"from {first} {shades[0]!r} to {last} {shades[-1]!r}"]


def _shade(value: float, low: float, span: float, shades: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "?"
    return shades[min(int((value / 2 - low / 2) / span * len(shades)), len(shades) - 1)]
