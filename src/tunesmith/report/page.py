"""One HTML page that needs nothing else: styles and pictures are in it, scripts are not.

All text passes `visible` and HTML escaping on its way into the template, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunesmith import __version__
from tunesmith.core.report import SCHEMA_VERSION, Figure, Plot, Report, Sample, Value
from tunesmith.report import bars, heatmap, layout, lines, svg
from tunesmith.report.curves import curves
from tunesmith.report.text import clip, compare, visible
from tunesmith.report.theme import shades
from tunesmith.report.units import Change, change, exact, number, part_of

CLIP_CHARACTERS, CLIP_LINES = 600, 12
LONGEST_TEXT = 20_000
"""Characters of a text that the page holds; `report.json` holds all of them."""
MOST_ROWS = 500
"""Rows of a table that the page holds."""
_WIDE, _NARROW = 912, 440
_MANY_POINTS, _MANY_COLUMNS, _MANY_CELLS = 60, 12, 100
_DRAW: dict[str, Callable[[Plot, int, str, str], str]] = {
    "line": lines.draw,
    "bar": bars.draw,
    "heatmap": heatmap.draw,
}
_ARROWS = {"up": "▲", "down": "▼", "same": "=", "lost": "!"}


@dataclass(frozen=True)
class Card:
    """A key figure as it stands in the page."""

    name: str
    before: str
    value: str
    unit: str
    full: str
    whole: str
    moved: Change | None
    help: str


@dataclass(frozen=True)
class Drawing:
    """A plot as it stands in the page."""

    title: str
    pictures: list[Markup]
    legend: list[tuple[Markup, str]]
    caption: str
    wide: bool


@dataclass(frozen=True)
class Text:
    """A text of any length.

    Attributes:
        head: What is shown until the rest is asked for; None where nothing has to be asked for.
        body: All of it.
        length: Its number of characters.
        rest: What cannot be seen or is not in the page, in words.
    """

    head: str | None
    body: Markup | str
    length: str
    rest: str


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    model: str
    text: Text
    correct: bool | None
    only_space: bool


def render(report: Report) -> str:
    """The page of a checked report; equal reports give equal pages."""
    environment = Environment(
        autoescape=True,
        finalize=_readable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["minus"] = _minus
    folder = files("tunesmith.report")
    template = environment.from_string((folder / "page.jinja").read_text(encoding="utf-8"))
    style = shades() + (folder / "page.css").read_text(encoding="utf-8")
    return template.render(
        report=report,
        style=Markup(style),
        groups=[
            (g.heading, [_card(name, figure) for name, figure in g.figures.items()]) for g in layout.groups(report)
        ],
        plots=[_drawing(plot, f"p{i}") for i, plot in enumerate(report.plots)],
        tables=[(table, layout.columns(table)) for table in report.tables],
        samples=[(sample, text(sample.prompt), text(sample.expected), _answers(sample)) for sample in report.samples],
        listings=[(listing.title, text(listing.text)) for listing in report.listings],
        arrows=_ARROWS,
        most_rows=MOST_ROWS,
        version=__version__,
        schema_version=SCHEMA_VERSION,
    )


def _readable(value: object) -> object:
    """What the template writes for a value: text with nothing invisible in it, unless it is markup already."""
    return value if hasattr(value, "__html__") else visible(str(value))


def _minus(text: str) -> str:
    """A number with a minus sign in place of a hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text


def _card(name: str, figure: Figure) -> Card:
    unit, free = layout.split_unit(figure)
    moved = change(figure)
    # A change already says which way is good.
    side = f"{figure.better.capitalize()} is better." if figure.better and not moved else ""
    return Card(
        name=name,
        before="" if figure.before is None else _signed(figure.before, unit),
        value=_signed(figure.value, unit),
        unit=free,
        full=exact(figure.value),
        whole=part_of(figure),
        moved=moved,
        help=" ".join(filter(None, (figure.help, side))),
    )


def _signed(value: Value, unit: str) -> str:
    return number(value, unit) if isinstance(value, str) else _minus(number(value, unit))


def _drawing(plot: Plot, name: str) -> Drawing:
    draw = _DRAW[plot.kind]
    points = max((len(xs) for xs, _ in plot.series.values()), default=0)
    wide = {
        "line": plot.below is not None or points > _MANY_POINTS,
        "bar": False,
        "heatmap": bool(plot.matrix) and len(plot.matrix[0]) > _MANY_COLUMNS,
    }[plot.kind]
    pictures = [draw(plot, _NARROW, f"{name}n", "narrow" if wide else "only")]
    if wide:
        pictures.append(draw(plot, _WIDE, f"{name}w", "wide"))
    return Drawing(plot.title, [Markup(p) for p in pictures], _legend(plot, name), _caption(plot), wide)


def _legend(plot: Plot, name: str) -> list[tuple[Markup, str]]:
    """(swatch, label) of each series; empty where there is one plain series, which the axis names."""
    if plot.kind == "heatmap" or (plot.kind == "bar" and len(plot.series) < 2):
        return []
    entries: list[tuple[str, str]] = []
    if plot.kind == "bar":
        for i, label in enumerate(plot.series):
            entries.append(
                (svg.bar(2, 1, 22, 12, f"bar s{i % svg.SERIES}", fill=f"url(#{name}n-h{i % svg.SERIES})"), label)
            )
    else:
        found, below = curves(plot)[0], curves(plot.below)[0] if plot.below else []
        # One curve alone below is named by its axis.
        found += below if len(below) > 1 else []
        for i, curve in enumerate(found):
            entries.append((_swatch(curve.style, len(curve.xs), i), curve.label))
        if any(not curve.finite.all() for curve in found):
            entries.append((svg.crosses([(13, 7)]), "not a finite number"))
    if len(entries) == 1 and plot.styles.get(entries[0][1]) != "smooth":
        return []
    return [(Markup(f'<svg viewBox="0 0 26 14" aria-hidden="true">{drawn}</svg>'), label) for drawn, label in entries]


def _swatch(style: str, points: int, series: int) -> str:
    cls = f"s{series % svg.SERIES}"
    if style == "smooth":
        raw = svg.path([(0, 9), (5, 3), (10, 11), (15, 4), (20, 10), (26, 5)], f"line raw {cls}")
        return raw + svg.rule(0, 7, 26, 7, f"line {cls}")
    if style == "points" or points <= 2:
        return svg.rule(0, 7, 26, 7, f"line joined {cls}") + svg.markers([(13, 7)], series)
    return svg.rule(0, 7, 26, 7, f"line {cls}")


def _caption(plot: Plot) -> str:
    said = [plot.note] if plot.note else []
    if "smooth" in plot.styles.values():
        said.append("Thin: as logged. Thick: running average.")
    if plot.kind == "heatmap" and sum(map(len, plot.matrix)) > _MANY_CELLS:
        said.append(heatmap.describe(plot))
    if plot.kind == "bar" and (more := len(bars.names(plot)) - bars.MOST_CATEGORIES) > 0:
        said.append(f"{more} more are in report.json.")
    return " ".join(said)


def text(whole: str) -> Text:
    """A text of the page, clipped."""
    return _text(whole, _held(whole))


def _held(whole: str) -> str:
    """What of a text the page holds: an end of blank lines is told, not shown."""
    shown = whole[:LONGEST_TEXT]
    ended = shown.rstrip()
    return ended if not ended or shown.count("\n", len(ended)) > 2 else shown


def _text(whole: str, body: Markup | str) -> Text:
    shown = _held(whole)
    head = clip(shown, CLIP_CHARACTERS, CLIP_LINES)
    rest = ""
    if len(whole) > LONGEST_TEXT:
        rest = f"{number(len(whole) - LONGEST_TEXT)} more characters are in report.json"
    elif len(whole) > len(shown):
        blank = whole[len(shown) :]
        breaks = set(blank) == {"\n"}
        rest = f"and {number(len(blank))} {'line breaks' if breaks else 'characters of white space'}"
    return Text(head if len(head) < len(shown) else None, body, number(len(whole)), rest)


def _answers(sample: Sample) -> list[Answer]:
    answers = []
    for model, said in sample.outputs.items():
        body = Markup("").join(
            Markup(f'<span class="{piece.kind}">{{}}</span>').format(visible(piece.text))
            if piece.kind != "same"
            else visible(piece.text)
            for piece in compare(sample.expected, _held(said))
        )
        only_space = said != sample.expected and said.split() == sample.expected.split() and bool(sample.expected)
        answers.append(Answer(model, _text(said, body), sample.correct.get(model), only_space))
    return answers
