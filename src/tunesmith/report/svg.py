"""The pieces that plots are drawn from. Colours are classes, so that the page's style sheet sets them by theme."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from tunesmith.report.text import visible

Anchor = Literal["start", "middle", "end"]
SERIES = 8
"""Series that can be told apart; more share a colour, a dash pattern and a marker."""
_CHARACTER = 7.0
_MARKERS = ("circle", "square", "diamond", "triangle")


def escape(text: str) -> str:
    """Safe in HTML, as text and in quotes, with nothing invisible left."""
    return html.escape(visible(text), quote=True)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def width_of(text: str) -> float:
    """About how wide `text` is at 12 px, in px; wide East Asian characters count double."""
    return sum(_CHARACTER * (1.7 if unicodedata.east_asian_width(c) in "WF" else 1.0) for c in text)


def fit(text: str, width: float) -> str:
    """`text`, cut with an ellipsis if it is wider than `width` px."""
    shown = visible(text).replace("\n", " ")
    if width_of(shown) <= width:
        return shown
    while shown and width_of(shown) + _CHARACTER > width:
        shown = shown[:-1]
    return shown + "…"


def text(x: float, y: float, content: str, cls: str = "tick", anchor: Anchor = "start", title: str = "") -> str:
    """One line of text with its baseline at y; `title` is shown by hovering."""
    if content[:1] == "-" and content[1:2].isdigit():
        content = "−" + content[1:]
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<text class="{cls}" x="{number(x)}" y="{number(y)}"{at}>{tip}{escape(content)}</text>'


def path(points: Iterable[tuple[float, float]], cls: str) -> str:
    """An open line through the points."""
    steps = [f"{number(x)} {number(y)}" for x, y in points]
    return f'<path class="{cls}" d="M{"L".join(steps)}"/>' if steps else ""


def rule(x: float, y: float, to_x: float, to_y: float, cls: str) -> str:
    """A straight line."""
    return f'<path class="{cls}" d="M{number(x)} {number(y)}L{number(to_x)} {number(to_y)}"/>'


def markers(points: Iterable[tuple[float, float]], series: int) -> str:
    """The marks of a series, all in one path; their shape says which series it is."""
    shape = _MARKERS[series % len(_MARKERS)]
    marks = []
    for x, y in points:
        at = f"M{number(x)} {number(y)}"
        if shape == "circle":
            marks.append(f"{at}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z")
        elif shape == "square":
            marks.append(f"{at}m-3.6-3.6h7.2v7.2h-7.2z")
        elif shape == "diamond":
            marks.append(f"{at}m0-5l5 5l-5 5l-5-5z")
        else:
            marks.append(f"{at}m0-4.6l4.6 8h-9.2z")
    return f'<path class="mark s{series % SERIES}" d="{"".join(marks)}"/>' if marks else ""


def crosses(points: Iterable[tuple[float, float]]) -> str:
    """Where a series has no finite value."""
    marks = [f"M{number(x - 3)} {number(y - 3)}l6 6m-6 0l6-6" for x, y in points]
    return f'<path class="lost" d="{"".join(marks)}"/>' if marks else ""


def bar(x: float, y: float, width: float, height: float, cls: str, title: str = "", fill: str = "") -> str:
    """A rectangle; `title` is shown by hovering, `fill` names a pattern."""
    at = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    filled = f' style="fill:{fill}"' if fill else ""
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{cls}" {at}{filled}>{tip}</rect>'


def document(width: float, height: float, name: str, cls: str, title: str, about: str, content: Sequence[str]) -> str:
    """The picture: scaled by its view box, named and described for those who do not see it.

    Args:
        name: Unique in the page; ids begin with it.
        cls: Class of the element.
        about: What the picture shows, in words.
    """
    box = f'viewBox="0 0 {number(width)} {number(height)}"'
    return (
        f'<svg class="{cls}" {box} role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(about)}</desc>'
        f"{''.join(content)}</svg>"
    )
