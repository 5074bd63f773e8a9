"""Heatmaps as SVG: one path per shade, the value in every cell that has room for it, a scale beside them."""

from __future__ import annotations

import math

import numpy as np

from tunesmith.core.report import Plot
from tunesmith.report import svg
from tunesmith.report.curves import TINY, beyond
from tunesmith.report.units import alike, number

LEVELS = 21
"""Shades of the scale; an odd number, so that a diverging scale has one in the middle."""
MOST_CELLS = 96
"""Rows and columns of the picture; larger matrices are averaged down to it."""
_HOVERED = 400
_SCALE = 160
_DIGITS = 2
# Below this share, what lies on the other side of zero is noise, and half of a diverging scale would go unused.
_TWO_SIDED = 0.15


def draw(plot: Plot, width: int, name: str, cls: str) -> str:
    """The map, `width` px wide, its labels set at 12 px."""
    values, rows, columns = shrink(plot)
    if values.size == 0:
        return svg.document(width, 40, name, cls, plot.title, "No cells.", [svg.text(0, 24, "no cells", "name")])
    low, high, diverging = _range(values)
    left = min(max(map(svg.width_of, rows), default=0.0), 0.3 * width) + 8
    cell = min((width - left) / len(columns), 56.0)
    tall = min(max(cell, 14.0), 30.0)
    top = 22.0 if plot.y else 6.0
    parts = [svg.text(0, 12, svg.fit(plot.y, width), "name")] if plot.y else []
    shades = _shades(values, low, high)
    kind = "v" if diverging else "h"
    parts += _cells(shades, left, top, cell, tall, kind)
    texts = cell_texts(plot, values)
    if max(svg.width_of(t) for row in texts for t in row) <= cell - 4:
        for i, row in enumerate(texts):
            for j, told in enumerate(row):
                ink = "cell-nan" if shades[i, j] < 0 else f"cell-{kind}{_contrast(int(shades[i, j]), diverging)}"
                at = left + (j + 0.5) * cell, top + (i + 0.5) * tall + 4
                parts.append(svg.text(*at, told, f"cell {ink}", "middle"))
    elif values.size <= _HOVERED:
        for i, row in enumerate(texts):
            for j, told in enumerate(row):
                tip = f"{rows[i]}, {columns[j]}: {told}"
                parts.append(svg.bar(left + j * cell, top + i * tall, cell, tall, "hit", tip))
    bottom = top + len(rows) * tall
    parts += _labels(rows, columns, left, top, cell, tall)
    across = left + len(columns) * cell
    turned = _turned(columns, cell)
    bottom += (min(max(map(svg.width_of, columns)), 90.0) + 12) if turned else 18
    if plot.x:
        parts.append(svg.text(across, bottom + 16, svg.fit(plot.x, across), "name", "end"))
        bottom += 20
    parts += _scale(low, high, kind, bottom + 18, plot.unit, bool((shades < 0).any()))
    return svg.document(width, bottom + 52, name, cls, plot.title, describe(plot), parts)


def shrink(plot: Plot) -> tuple[np.ndarray, list[str], list[str]]:
    """(values, row names, column names) of the picture: blocks of a large matrix are averaged."""
    values = np.array([list(row) for row in plot.matrix], dtype=np.float64)
    if values.size == 0:
        return values, [], []
    rows = list(plot.row_labels) or [str(i) for i in range(values.shape[0])]
    columns = list(plot.column_labels) or [str(i) for i in range(values.shape[1])]
    values, rows = _average(values, rows)
    turned, columns = _average(values.T, columns)
    return turned.T, rows, columns


def cell_texts(plot: Plot, values: np.ndarray) -> list[list[str]]:
    """What stands in the cells, all with the same decimals."""
    texts = alike(values.ravel().tolist(), plot.unit, _DIGITS)
    return [texts[i : i + values.shape[1]] for i in range(0, len(texts), values.shape[1])]


def _average(values: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    if len(names) <= MOST_CELLS:
        return values, names
    blocks = np.array_split(np.arange(len(names)), MOST_CELLS)
    return np.stack([values[block].mean(0) for block in blocks]), [names[block[0]] for block in blocks]


def _range(values: np.ndarray) -> tuple[float, float, bool]:
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return 0.0, 1.0, False
    low, high = float(known.min()), float(known.max())
    if low < 0 < high and high - low > TINY and min(-low, high) > _TWO_SIDED * max(-low, high):
        edge = max(-low, high)
        return -edge, edge, True
    return (low, high, False) if high / 2 - low / 2 > TINY else (*beyond(low, high), False)


def _shades(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The level of each cell, -1 where the value is not finite."""
    known = np.isfinite(values)
    share = (np.where(known, values, low) / 2 - low / 2) / (high / 2 - low / 2)
    return np.where(known, np.minimum((share * LEVELS).astype(int), LEVELS - 1), -1)


def _contrast(level: int, diverging: bool) -> int:
    """1 where text needs the page's colour instead of the ink's."""
    return int(abs(level - LEVELS // 2) > 5 if diverging else level > LEVELS // 2)


def _cells(shades: np.ndarray, left: float, top: float, cell: float, tall: float, kind: str) -> list[str]:
    gap = 1.0 if cell >= 8 else 0.0
    size = f"h{svg.number(cell - gap)}v{svg.number(tall - gap)}h{svg.number(gap - cell)}z"
    parts = []
    for level in np.unique(shades).tolist():
        places = np.argwhere(shades == level).tolist()
        steps = "".join(f"M{svg.number(left + j * cell)} {svg.number(top + i * tall)}{size}" for i, j in places)
        parts.append(f'<path class="{kind}{level}" d="{steps}"/>' if level >= 0 else f'<path class="hn" d="{steps}"/>')
    return parts


def _turned(columns: list[str], cell: float) -> bool:
    return max(map(svg.width_of, columns)) > 3 * cell and not all(c.isdigit() for c in columns)


def _labels(rows: list[str], columns: list[str], left: float, top: float, cell: float, tall: float) -> list[str]:
    parts = []
    for i, row in enumerate(rows):
        parts.append(svg.text(left - 8, top + (i + 0.5) * tall + 4, svg.fit(row, left - 8), "label", "end", row))
    bottom = top + len(rows) * tall
    widest = max(map(svg.width_of, columns)) + 6
    if _turned(columns, cell):
        for j in range(0, len(columns), max(1, math.ceil(14 / cell))):
            x, y = left + (j + 0.5) * cell + 4, bottom + 8
            told = svg.escape(svg.fit(columns[j], 90))
            turn = f'transform="translate({svg.number(x)} {svg.number(y)}) rotate(-90)"'
            parts.append(f'<text class="label" text-anchor="end" {turn}>{told}</text>')
        return parts
    for j in range(0, len(columns), max(1, math.ceil(widest / cell))):
        parts.append(svg.text(left + (j + 0.5) * cell, bottom + 15, columns[j], "label", "middle"))
    return parts


def _scale(low: float, high: float, kind: str, y: float, unit: str, lost: bool) -> list[str]:
    first, last = alike([low, high], unit, _DIGITS)
    x = svg.width_of(first) + 8
    step = _SCALE / LEVELS
    parts = [svg.text(0, y + 10, first, "tick")]
    parts += [svg.bar(x + i * step, y, step + 0.3, 12, f"{kind}{i}") for i in range(LEVELS)]
    parts.append(svg.text(x + _SCALE + 8, y + 10, last, "tick"))
    if lost:
        at = x + _SCALE + svg.width_of(last) + 28
        parts += [svg.bar(at, y, 12, 12, "hn"), svg.text(at + 18, y + 10, "not finite", "tick")]
    return parts


def describe(plot: Plot) -> str:
    """The extremes in words; what the picture cannot say exactly."""
    values = np.array([list(row) for row in plot.matrix], dtype=np.float64)
    known = np.isfinite(values)
    if not known.any():
        return "No finite value."

    def at(flat: int) -> str:
        i, j = np.unravel_index(flat, values.shape)
        row = plot.row_labels[i] if plot.row_labels else str(i)
        column = plot.column_labels[j] if plot.column_labels else str(j)
        return f"{number(float(values[i, j]), plot.unit)} ({row}, {column})"

    lowest, highest = int(np.where(known, values, np.inf).argmin()), int(np.where(known, values, -np.inf).argmax())
    lost = int(values.size - known.sum())
    averaged = max(values.shape) > MOST_CELLS
    return (
        f"Lowest {at(lowest)}, highest {at(highest)}."
        + (f" {number(lost)} cells are not finite." if lost else "")
        + (f" The picture averages blocks of the {values.shape[0]} by {values.shape[1]} cells." if averaged else "")
    )
