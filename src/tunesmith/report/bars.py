"""Bar charts as SVG: horizontal, so that names fit; every bar with its value, every series with its own hatching."""

from __future__ import annotations

import math

from tunesmith.core.report import Plot
from tunesmith.report import svg
from tunesmith.report.units import alike

MOST_CATEGORIES = 40
_THICK, _THIN, _GAP, _BOTTOM = 20, 15, 12, 30
_DIGITS = 3


def draw(plot: Plot, width: int, name: str, cls: str) -> str:
    """The chart, `width` px wide, its labels set at 12 px."""
    categories = names(plot)
    values = {label: dict(zip(map(str, xs), ys, strict=True)) for label, (xs, ys) in plot.series.items()}
    shown = categories[:MOST_CATEGORIES]
    written = {place: told for place, told in texts(plot).items() if place[0] in shown}
    if not written:
        return svg.document(width, 40, name, cls, plot.title, "No bars.", [svg.text(0, 24, "no bars", "name")])
    left = min(max(map(svg.width_of, shown), default=0.0), 0.38 * width) + 10
    room = max(map(svg.width_of, written.values()), default=0.0) + 8
    known = [values[s][c] for c, s in written if math.isfinite(values[s][c])]
    low, high = min([0.0, *known]), max([0.0, *known])
    # The text of a negative bar stands to its left.
    start = left + (room if low < 0 else 0)
    reach = max(width - start - room, 1.0)
    span = high / 2 - low / 2 or 1.0

    def place(value: float) -> float:
        return start + (value / 2 - low / 2) / span * reach

    thick = _THICK if len(values) == 1 else _THIN
    parts = [patterns(name)] if len(values) > 1 else []
    y = 26.0 if plot.y else 4.0
    top = y
    if plot.y:
        parts.append(svg.text(0, 12, svg.fit(plot.y, width), "name"))
    for category in shown:
        middle = y + len(values) * thick / 2 + 4
        parts.append(svg.text(left - 10, middle, svg.fit(category, left - 10), "label", "end", category))
        for series, (label, held) in enumerate(values.items()):
            if category in held:
                told, value = written[category, label], held[category]
                tip = f"{category}, {label}: {told}"
                ends = sorted((place(0.0), place(value if math.isfinite(value) else 0.0)))
                at = y + series * thick
                fill = f"url(#{name}-h{series % svg.SERIES})" if len(values) > 1 else ""
                parts.append(
                    svg.bar(ends[0], at + 1, ends[1] - ends[0], thick - 2, f"bar s{series % svg.SERIES}", tip, fill)
                )
                if value < 0:
                    parts.append(svg.text(ends[0] - 5, at + thick / 2 + 4, told, "value", "end"))
                else:
                    parts.append(svg.text(ends[1] + 5, at + thick / 2 + 4, told, "value"))
        y += len(values) * thick + _GAP
    parts.append(svg.rule(place(0.0), top - 2, place(0.0), y - _GAP + 2, "axis"))
    if plot.x:
        parts.append(svg.text(0, y + 8, svg.fit(plot.x, width), "name"))
    height = y + (_BOTTOM - _GAP if plot.x else 0)
    return svg.document(width, height, name, cls, plot.title, describe(plot), parts)


def names(plot: Plot) -> list[str]:
    """The categories, in order of first appearance."""
    return list(dict.fromkeys(str(x) for xs, _ in plot.series.values() for x in xs))


def texts(plot: Plot) -> dict[tuple[str, str], str]:
    """`{(category, series): value}`, all with the same decimals."""
    places = [(str(x), label) for label, (xs, _) in plot.series.items() for x in xs]
    return dict(zip(places, alike([y for _, ys in plot.series.values() for y in ys], plot.unit, _DIGITS), strict=True))


def patterns(name: str) -> str:
    """Hatchings by series, for ids that begin with `name`."""
    lines = ("M0 6L6 0M-1 1L1-1M5 7L7 5", "M0 0H6V6H0z", "M0 3H6", "M3 0V6M0 3H6")
    made = []
    for series in range(svg.SERIES):
        line = lines[series % len(lines)]
        cls = f"s{series}" + (" solid" if line.endswith("z") else "")
        made.append(
            f'<pattern id="{name}-h{series}" width="6" height="6" patternUnits="userSpaceOnUse">'
            f'<rect class="hatch {cls}" width="6" height="6"/><path class="hatch {cls}" d="{line}"/></pattern>'
        )
    return f"<defs>{''.join(made)}</defs>"


def describe(plot: Plot) -> str:
    """The bars in words."""
    written = texts(plot)
    lines = []
    for label, (xs, _) in plot.series.items():
        lines.append(f"{label}: {', '.join(f'{x} {written[str(x), label]}' for x in xs)}.")
    return " ".join(lines) or "No bars."
