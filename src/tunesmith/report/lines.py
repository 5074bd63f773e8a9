"""Line plots as SVG: thin raw curves with their running average, marked points, a small second plot below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunesmith.core.report import Plot
from tunesmith.report import svg
from tunesmith.report.curves import Axis, Curve, curves, smooth, thin, x_axis, y_axis
from tunesmith.report.units import number

_TOP, _BOTTOM, _RIGHT, _GAP = 22, 44, 14, 20
_HOVER, _LABEL, _TICK = 48, 100, 70
_FEW_POINTS = 2


def draw(plot: Plot, width: int, name: str, cls: str) -> str:
    """The plot, `width` px wide, its labels set at 12 px."""
    panels = [plot] if plot.below is None else [plot, plot.below]
    heights = [300 if width > 600 else 230, 70]
    held = [curves(panel) for panel in panels]
    every = [curve for found, _ in held for curve in found]
    categories = next((names for _, names in held if names), [])
    y_axes = [
        y_axis(found, panel.y_scale, panel.unit, 5 if height > 100 else 2)
        for panel, (found, _), height in zip(panels, held, heights, strict=False)
    ]
    left = max((svg.width_of(label) for axis in y_axes for _, label in axis.ticks), default=0.0) + 12
    longest = min(max((svg.width_of(name) for name in categories), default=0.0) + 16, _LABEL)
    across = x_axis(every, categories, plot.x_scale, int((width - left) / (longest if categories else _TICK)))
    parts: list[str] = []
    top, series = 0.0, 0
    for panel, (found, _), axis, height in zip(panels, held, y_axes, heights, strict=False):
        frame = _Frame(left, top + _TOP, width - left - _RIGHT, height, across, axis)
        parts += [svg.text(0, top + 12, svg.fit(panel.y or panel.title, width), "name"), *frame.grid()]
        if not any(len(curve.xs) for curve in found):
            parts.append(svg.text(left + frame.width / 2, frame.top + height / 2, "no points", "name", "middle"))
        lone = panel is not plot and len(found) == 1
        for curve in found:
            parts += _curve(curve, frame, svg.SERIES - 1 if lone else series, " lone" if lone else "")
            series += 1
        parts += _hover(panel, found, frame, categories)
        top += _TOP + height + _GAP
    bottom = top - _GAP
    parts += _x_labels(across, left, width - left - _RIGHT, bottom, plot.x)
    return svg.document(width, bottom + _BOTTOM, name, cls, plot.title, describe(plot), parts)


class _Frame:
    """The rectangle of a panel and its axes."""

    def __init__(self, left: float, top: float, width: float, height: float, x: Axis, y: Axis):
        self.left, self.top, self.width, self.height, self.x, self.y = left, top, width, height, x, y

    def points(self, xs: np.ndarray, ys: np.ndarray) -> list[tuple[float, float]]:
        across = self.left + self.x.place(xs) * self.width
        up = self.top + (1 - self.y.place(ys)) * self.height
        return list(zip(across.tolist(), up.tolist(), strict=True))

    def grid(self) -> list[str]:
        parts = []
        for value, label in self.y.ticks:
            y = self.top + (1 - float(self.y.place(np.array(value)))) * self.height
            parts.append(svg.rule(self.left, y, self.left + self.width, y, "grid"))
            parts.append(svg.text(self.left - 8, y + 4, label, "tick", "end"))
        base = self.top + self.height
        return [*parts, svg.rule(self.left, base, self.left + self.width, base, "axis")]


def _curve(curve: Curve, frame: _Frame, series: int, extra: str) -> list[str]:
    cls = f"s{series % svg.SERIES}{extra}"
    parts: list[str] = []
    if curve.style == "smooth" and curve.finite.sum() > _FEW_POINTS:
        parts += _stretches(thin(curve, int(frame.width / 4)), frame, f"line raw {cls}")
        average = replace(curve, ys=smooth(curve.ys))
        parts += _stretches(thin(average, int(frame.width / 8)), frame, f"line {cls}")
    else:
        marked = curve.style == "points" or curve.finite.sum() <= _FEW_POINTS
        parts += _stretches(thin(curve, int(frame.width / 3)), frame, f"line {'joined ' if marked else ''}{cls}")
        if marked:
            parts.append(svg.markers(frame.points(curve.xs[curve.finite], curve.ys[curve.finite]), series))
    lost = curve.xs[~curve.finite]
    if len(lost):
        across = frame.left + frame.x.place(lost) * frame.width
        parts.append(svg.crosses((x, frame.top + 5) for x in dict.fromkeys(np.round(across).tolist())))
    return parts


def _stretches(curve: Curve, frame: _Frame, cls: str) -> list[str]:
    """The line, broken where there is no finite value."""
    known = np.flatnonzero(curve.finite)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []
    return [svg.path(frame.points(curve.xs[run], curve.ys[run]), cls) for run in runs if len(run) > 1]


def _x_labels(axis: Axis, left: float, width: float, bottom: float, name: str) -> list[str]:
    parts = []
    room = max(width / max(len(axis.ticks), 1) - 6, 30)
    for value, told in axis.ticks:
        label = svg.fit(told, room)
        x = left + float(axis.place(np.array(value))) * width
        parts.append(svg.rule(x, bottom, x, bottom + 4, "axis"))
        if x + svg.width_of(label) / 2 > left + width + _RIGHT:
            parts.append(svg.text(left + width + _RIGHT, bottom + 18, label, "tick", "end"))
        else:
            parts.append(svg.text(x, bottom + 18, label, "tick", "middle"))
    return [*parts, svg.text(left + width, bottom + 36, svg.fit(name, width), "name", "end")]


def _hover(plot: Plot, found: Sequence[Curve], frame: _Frame, categories: list[str]) -> list[str]:
    """Invisible columns that show the values below the pointer."""
    xs = np.unique(np.concatenate([c.xs for c in found])) if found else np.array([])
    if len(xs) == 0:
        return []
    xs = xs[np.unique(np.linspace(0, len(xs) - 1, _HOVER).round().astype(int))]
    places = frame.left + frame.x.place(xs) * frame.width
    edges = np.concatenate([[frame.left], (places[1:] + places[:-1]) / 2, [frame.left + frame.width]])
    averages = {c.label: smooth(c.ys) if c.style == "smooth" and len(c.xs) > _FEW_POINTS else c.ys for c in found}
    parts = []
    for i, x in enumerate(xs.tolist()):
        lines = [f"{plot.x or 'x'} {categories[int(x)] if categories else number(_whole(x))}"]
        for curve in found:
            at = np.searchsorted(curve.xs, x)
            if at < len(curve.xs) and curve.xs[at] == x:
                lines.append(f"{curve.label}: {number(float(averages[curve.label][at]), plot.unit)}")
        parts.append(svg.bar(edges[i], frame.top, edges[i + 1] - edges[i], frame.height, "hit", "\n".join(lines)))
    return parts


def _whole(x: float) -> float | int:
    return int(x) if x.is_integer() and abs(x) < 1e15 else x


def describe(plot: Plot) -> str:
    """The curves in words."""
    lines = []
    for panel in [plot] if plot.below is None else [plot, plot.below]:
        found, categories = curves(panel)
        for curve in found:
            lines.append(_in_words(panel, curve, categories))
    return " ".join(lines) or "No points."


def _in_words(plot: Plot, curve: Curve, categories: list[str]) -> str:
    known = np.flatnonzero(curve.finite)
    if len(known) == 0:
        return f"{curve.label}: no finite value in {len(curve.xs)} points."

    def at(i: int) -> str:
        x = curve.xs[i]
        place = categories[int(x)] if categories else number(_whole(float(x)))
        return f"{number(float(curve.ys[i]), plot.unit)} at {place}"

    ys = curve.ys[known]
    lost = len(curve.xs) - len(known)
    return (
        f"{curve.label}: {number(len(curve.xs))} points, from {at(known[0])} to {at(known[-1])}, "
        f"lowest {at(known[ys.argmin()])}, highest {at(known[ys.argmax()])}"
        + (f", {lost} not finite." if lost else ".")
    )
