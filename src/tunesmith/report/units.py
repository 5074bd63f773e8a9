"""Numbers as people read them: 1,234; 5.27 M; 12.4 MB; 3.2 s; 45.3 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeGuard

from tunesmith.core.report import Figure, Value

ABSENT = "–"
FORMATTED = ("share", "bytes", "seconds", "count")
"""Units that change how a number is written; any other is written behind it."""
# From here on digits no longer help: 1,234,567,890,123,456 is read as "large".
_SCIENTIFIC_ABOVE = 1e15
_SCIENTIFIC_BELOW = 1e-4
# An integer above this does not fit a float, whatever it is divided by.
_HUGE = 10**300


@dataclass(frozen=True)
class Change:
    """How a figure moved.

    Attributes:
        text: The difference: in points for a share, else in percent of what was before.
        direction: Of the number; `lost` where one of the two is not finite.
        verdict: Whether that is good; empty where the figure has no better side.
    """

    text: str
    direction: Literal["up", "down", "same", "lost"]
    verdict: Literal["better", "worse", ""]


def number(value: Value, unit: str = "") -> str:
    """`value` with its unit; see `Figure.unit`."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if abs(value) > _HUGE:
        return f"{_scientific(value)} {'' if unit == 'count' else unit}".rstrip()
    if unit == "share":
        return f"{_percent(value)} %"
    if unit == "bytes":
        return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))
    if unit == "seconds":
        return _duration(value)
    if unit == "count":
        return _count(value)
    return f"{_plain(value)} {unit}".rstrip()


def alike(values: Sequence[float], unit: str, digits: int) -> list[str]:
    """The values as they stand side by side: with the same decimals, `digits` digits of the largest."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if unit or not 1e-3 < largest < 1e6:
        return [number(v, unit) for v in values]
    whole = all(v.is_integer() for v in map(float, values) if math.isfinite(v))
    decimals = 0 if whole else max(0, digits - 1 - math.floor(math.log10(largest)))
    texts = [f"{v:,.{decimals}f}" if math.isfinite(v) else number(v) for v in values]
    # What rounds to zero has no sign.
    return [t.removeprefix("-") if t.startswith("-") and not t.strip("-0.") else t for t in texts]


def exact(value: Value) -> str:
    """Every digit, for those who want them; empty for what is no number or has too many."""
    if not _is_number(value) or isinstance(value, bool):
        return ""
    return str(value) if isinstance(value, float) else f"{value:,}" if abs(value) < _HUGE else ""


def part_of(figure: Figure) -> str:
    """`of 110 M (4.8 %)`; empty where the figure is not part of a whole."""
    if figure.of is None:
        return ""
    whole = f"of {number(figure.of, figure.unit)}"
    if not _is_number(figure.value) or not _is_number(figure.of) or not figure.of:
        return whole
    return f"{whole} ({number(_ratio(figure.value, figure.of), 'share')})"


def change(figure: Figure) -> Change | None:
    """From `before` to `value`; None where one of them is missing or not a number."""
    before, after = figure.before, figure.value
    if not isinstance(before, float | int) or not isinstance(after, float | int):
        return None
    if isinstance(before, bool) or isinstance(after, bool):
        return None
    if not (_is_number(before) and _is_number(after)):
        text = f"now {number(after)}" if not _is_number(after) else f"was {number(before)}"
        lost = _is_number(before) and figure.better is not None
        return Change(text, "lost", "worse" if lost else "")
    text = _difference(before, after, figure.unit)
    if not text:
        return Change("no change", "same", "")
    direction: Literal["up", "down"] = "up" if after > before else "down"
    if figure.better is None:
        return Change(text, direction, "")
    return Change(text, direction, "better" if (direction == "up") == (figure.better == "higher") else "worse")


def _difference(before: float | int, after: float | int, unit: str) -> str:
    if before == after:
        return ""
    if max(abs(before), abs(after)) > _HUGE:
        return f"now {number(after, unit)}"
    if unit == "share":
        points = f"{(after - before) * 100:+,.1f}"
        return "" if float(points.replace(",", "")) == 0 else f"{points} points"
    if before <= 0 or after < 0:
        # A percentage of nothing, or of less than nothing, says nothing.
        return f"{'+' if after > before else '-'}{number(abs(after - before), unit)}"
    ratio = _ratio(after, before)
    if ratio >= 10:
        return f"{_plain(round(ratio))} times as much"
    percent = f"{(ratio - 1) * 100:+.1f}"
    return "" if float(percent) == 0 else f"{percent} %"


def _ratio(part: float | int, whole: float | int) -> float:
    return float(Decimal(part) / Decimal(whole))


def _is_number(value: Value) -> TypeGuard[float | int]:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: float | int) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= _SCIENTIFIC_ABOVE or size < _SCIENTIFIC_BELOW:
        return _scientific(value)
    if isinstance(value, int):
        return f"{value:,}"
    if size >= 1000:
        return f"{value:,.0f}"
    # Three decimals around one, four digits above, three below.
    digits = 4 if size >= 1 else 3
    decade = math.floor(math.log10(float(f"{size:.{digits}g}")))
    return f"{value:.{max(0, digits - 1 - decade)}f}"


def _scientific(value: float | int) -> str:
    mantissa, _, exponent = f"{Decimal(value):.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _count(value: float | int) -> str:
    if abs(value) >= _SCIENTIFIC_ABOVE:
        return _scientific(value)
    if abs(value) < 1e6:
        return f"{value:,}" if isinstance(value, int) else _plain(value)
    return _scaled(value, 1000, ("", "k", "M", "B", "T"))


def _scaled(value: float | int, base: int, names: tuple[str, ...]) -> str:
    size, at = abs(value), 0
    # 999.5 would be rounded up to a fourth digit.
    while size >= 999.5 and at < len(names) - 1:
        size, at = size / base, at + 1
    sign = "-" if value < 0 else ""
    if size >= 99_999.5:
        text = _scientific(size)
    elif at == 0:
        text = f"{size:.3g}"
    else:
        text = f"{size:,.0f}" if size >= 99.95 else f"{size:.1f}" if size >= 9.995 else f"{size:.2f}"
    return f"{sign}{text} {names[at]}".rstrip()


def _percent(value: float | int) -> str:
    percent = value * 100
    size = abs(percent)
    if size == 0 or size == 100:
        return f"{percent:.0f}"
    if size >= 1e6:
        return _scientific(percent)
    if size < 0.1:
        return f"{percent:.2g}" if size >= 1e-4 else _scientific(percent)
    # 99.96 % is not 100 %: what is not whole is not rounded up to it.
    return f"{percent:.2f}" if 99.95 <= size < 100 else f"{percent:,.1f}"


def _duration(value: float | int) -> str:
    size = abs(value)
    sign = "-" if value < 0 else ""
    if size >= 100 * 86400:
        return f"{sign}{_plain(round(size / 86400))} days"
    if size >= 59.95:
        whole = round(size)
        if whole < 3600:
            return f"{sign}{whole // 60} min {whole % 60:02} s"
        minutes = round(size / 60)
        hours = f"{minutes // 60} h {minutes % 60:02} min"
        return f"{sign}{hours}" if minutes < 48 * 60 else f"{sign}{minutes // 1440} d {minutes % 1440 // 60} h"
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if size >= scale or (size == 0 and name == "s"):
            amount = size / scale
            return f"{sign}{amount:.0f} {name}" if amount >= 99.95 or size == 0 else f"{sign}{amount:.1f} {name}"
    return f"{_scientific(value)} s"
