"""The numbers of a line plot: positions, scales, ticks, running averages, and fewer points for the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tunesmith.core.report import Plot, Scale
from tunesmith.report.units import FORMATTED, number

# A running average over this share of a curve hides the noise of a batch and keeps the shape of a run.
_SMOOTHING = 0.03
_DECADES_FOR_LOG = 3.0
_LEAST_LOG = 1e-300  # below, room on a logarithmic axis would leave the normal numbers
TINY = 1e-300
"""A range below this is too small to be divided by."""
_LEAST = 1e-290
_LARGEST = 1.79e308


@dataclass(frozen=True)
class Curve:
    """A series as numbers, in the order of x.

    Attributes:
        xs: (n,) float64, finite.
        ys: (n,) float64; not finite where the series has no value.
    """

    label: str
    style: str
    xs: np.ndarray
    ys: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.ys)


@dataclass(frozen=True)
class Axis:
    """From values to places between 0 and 1.

    Attributes:
        low: Value at 0.
        high: Value at 1.
        ticks: `(value, label)` of those inside.
    """

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at `low`, 1 at `high`."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (np.log10(values) - low) / (high - low)
        else:
            # Halves, for the difference of two large values may not be a float.
            share = (values / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return np.clip(share, 0.0, 1.0)


def curves(plot: Plot) -> tuple[list[Curve], list[str]]:
    """The series as numbers, and the names of the x values where these are categories (else empty)."""
    categories: list[str] = []
    if any(isinstance(x, str) for xs, _ in plot.series.values() for x in xs):
        categories = list(dict.fromkeys(str(x) for xs, _ in plot.series.values() for x in xs))
    found = []
    for label, (xs, ys) in plot.series.items():
        where = np.array([categories.index(str(x)) for x in xs] if categories else xs, dtype=np.float64)
        values = np.array(ys, dtype=np.float64)
        known = np.isfinite(where)
        order = np.argsort(where[known], kind="stable")
        found.append(Curve(label, plot.styles.get(label, "line"), where[known][order], values[known][order]))
    return found, categories


def smooth(ys: np.ndarray) -> np.ndarray:
    """The running average of a curve, (n,): a Gaussian window, cut at both ends; gaps are left out and stay gaps."""
    n = len(ys)
    if n == 0:
        return ys
    sigma = max(_SMOOTHING * n, 1.0)
    reach = min(math.ceil(3 * sigma), n - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(ys)
    window /= window.sum()
    total = np.convolve(np.where(known, ys, 0.0), window)[reach : reach + n]
    weight = np.convolve(known.astype(np.float64), window)[reach : reach + n]
    return np.where(known, total / np.maximum(weight, 1e-300), np.nan)


def thin(curve: Curve, buckets: int) -> Curve:
    """At most four points per bucket: first, lowest, highest, last. What a picture so wide would show is unchanged."""
    n = len(curve.xs)
    if n <= 2 * buckets:
        return curve
    span = curve.xs[-1] - curve.xs[0]
    if not span > 0:
        return Curve(curve.label, curve.style, curve.xs[: 2 * buckets], curve.ys[: 2 * buckets])
    bucket = np.minimum(((curve.xs - curve.xs[0]) / span * buckets).astype(int), buckets - 1)
    keep: list[int] = []
    for members in np.split(np.arange(n), np.flatnonzero(np.diff(bucket)) + 1):
        known = members[np.isfinite(curve.ys[members])]
        if len(known) == 0:
            keep.append(int(members[0]))
            continue
        ys = curve.ys[known]
        keep += sorted({int(known[0]), int(known[ys.argmin()]), int(known[ys.argmax()]), int(known[-1])})
    return Curve(curve.label, curve.style, curve.xs[keep], curve.ys[keep])


def x_axis(found: Sequence[Curve], categories: list[str], scale: Scale, count: int) -> Axis:
    """The x axis: exactly as long as the data."""
    values = np.unique(np.concatenate([c.xs for c in found])) if found else np.array([])
    if categories:
        step = math.ceil(len(categories) / max(count, 1))
        named = [(float(i), categories[i]) for i in range(0, len(categories), step)]
        return Axis(-0.5, len(categories) - 0.5, False, named)
    if len(values) == 0:
        return Axis(0.0, 1.0, False, [])
    low, high = float(values[0]), float(values[-1])
    if high / 2 - low / 2 < TINY:
        below, above = beyond(low, high)
        return Axis(below, above, False, list(zip([low], _labels([low], "", False), strict=True)))
    log = low >= _LEAST_LOG and (scale == "log" or (scale == "auto" and _geometric(values)))
    if log and 1 < len(values) <= 2 * count:
        # Few places that grow by factors are the ones to name: ranks 1, 2, 4, 8.
        return Axis(low, high, True, [(v, _short(v)) for v in values.tolist()])
    return _axis(low, high, log, count, "")


def y_axis(found: Sequence[Curve], scale: Scale, unit: str, count: int) -> Axis:
    """The y axis: the data and a little room; from zero where the data nearly reach it."""
    values = np.concatenate([c.ys[c.finite] for c in found]) if found else np.array([])
    if len(values) == 0:
        return Axis(0.0, 1.0, False, [])
    low, high = float(values.min()), float(values.max())
    spans = low >= _LEAST_LOG and math.log10(high) - math.log10(low) > _DECADES_FOR_LOG
    if low >= _LEAST_LOG and (scale == "log" or (scale == "auto" and spans)):
        room = (math.log10(high) - math.log10(low)) * 0.05 or 0.5
        bottom, top = math.log10(low) - room, math.log10(high) + room
        return _axis(10 ** max(bottom, -307.0), 10 ** min(top, 308.2), True, count, unit)
    bottom, top = beyond(low, high)
    if 0 <= low <= 0.3 * high:
        bottom = 0.0
    return _axis(bottom, top, False, count, unit)


def beyond(low: float, high: float) -> tuple[float, float]:
    """A little more than [low, high], and something where that is next to nothing."""
    wide = high / 2 - low / 2
    room = 0.1 * wide if wide > TINY else max(0.1 * abs(low), _LEAST)
    return max(low - room, -_LARGEST), min(high + room, _LARGEST)


def _geometric(values: np.ndarray) -> bool:
    """Whether the values grow by factors rather than by steps, as ranks 1, 2, 4, 8, 16 do."""
    if len(values) < 4 or values[0] <= 0 or values[-1] / 8 < values[0]:
        return False
    steps, factors = np.diff(values / values[-1]), np.diff(np.log(values))
    return bool(factors.std() / factors.mean() < 0.5 * steps.std() / steps.mean())


def _axis(low: float, high: float, log: bool, count: int, unit: str) -> Axis:
    values = _log_ticks(low, high, count) if log else ticks(low, high, count)
    return Axis(low, high, log, list(zip(values, _labels(values, unit, log), strict=True)))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    raw = (high / 2 - low / 2) / max(count, 1) * 2
    decade = 10.0 ** math.floor(math.log10(raw))
    step = decade * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * (decade / raw))))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first < 2:
        values = [f * 10.0**e for e in range(first - 1, last + 1) for f in (1, 2, 5)]
    else:
        stride = math.ceil((last - first + 1) / (1.5 * max(count, 1)))
        values = [10.0**e for e in range(first, last + 1, stride)]
    inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
    return inside if len(inside) > 1 else [low, high]


def _labels(values: Sequence[float], unit: str, log: bool) -> list[str]:
    if unit == "share":
        return [f"{v:g} %" for v in (_rounded(100 * v) for v in values)]
    if unit in FORMATTED:
        return [_trimmed(number(_rounded(v), unit)) for v in values]
    largest = max((abs(v) for v in values), default=0.0)
    if log or largest >= 1e15 or 0 < largest < 1e-2:
        return [_short(v) for v in values]
    for scale, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, "k")):
        # Up to 10,000 the number itself is as short.
        if largest >= max(scale, 10_001.0):
            return [f"{v / scale:g}{name}" if v else "0" for v in map(_rounded, values)]
    step = min((b - a for a, b in pairwise(values)), default=0.0)
    if step <= 0:
        return [_short(v) for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:,.{decimals}f}" for v in map(_rounded, values)]


def _trimmed(text: str) -> str:
    """Without the zeros at the end of its decimals: `5 MB`, not `5.00 MB`."""
    amount, space, name = text.partition(" ")
    return (amount.rstrip("0").rstrip(".") if "." in amount else amount) + space + name


def _rounded(value: float) -> float:
    # 3 * 0.1 is 0.30000000000000004.
    return float(f"{value:.6g}") + 0.0


def _short(value: float) -> str:
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, e, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa
