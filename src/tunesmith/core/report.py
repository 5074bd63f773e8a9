"""What a run or an analysis found, as data: figures, tables, plots and samples. `tunesmith.report` renders it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from tunesmith.errors import TunesmithError, did_you_mean

Value = float | int | str | bool | None
Better = Literal["higher", "lower"]
Style = Literal["line", "smooth", "points"]
Scale = Literal["auto", "linear", "log"]
SCHEMA_VERSION = 1
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Figure:
    """One number, with what it takes to read it.

    Attributes:
        value: The number; after training where there is a before.
        before: The same before training; None where it has no meaning.
        unit: `share` (of 1, shown in percent), `bytes`, `seconds` or `count` are formatted for people; any other text
            is shown after the number, as in `tokens/s`.
        better: Which way is good; None where neither is.
        of: The whole that `value` is a part of, in the same unit: the parameters of which so many train.
        help: What was measured, in a sentence.
        group: The heading to show it under.
    """

    __pydantic_config__ = {"extra": "forbid"}

    value: Value
    before: Value = None
    unit: str = ""
    better: Better | None = None
    of: float | int | None = None
    help: str = ""
    group: str = ""


@dataclass
class Table:
    """Rows under named columns.

    Attributes:
        columns: Headings.
        rows: One sequence of cells per row, as long as `columns`. A cell that is a `Figure` is shown in its own unit; a
            column with a `before` among its figures is shown as three, before, after and change.
        note: A sentence under the table.
        units: The unit of each column's numbers, as in `Figure.unit`; empty where none has one.
        collapsed: Whether the page shows it only when asked.
    """

    __pydantic_config__ = {"extra": "forbid"}

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Figure | Value]] = field(default_factory=list)
    note: str = ""
    units: Sequence[str] = ()
    collapsed: bool = False


@dataclass
class Plot:
    """A picture to draw.

    Attributes:
        kind: `line` and `bar` use `series`; `heatmap` uses `matrix`.
        x: Name of the x axis, unit included; for a heatmap, of its columns.
        y: Name of the y axis, unit included; for a heatmap, of its rows.
        series: `{label: (x values, y values)}`; the x values of a bar chart, and of a line over categories, are text.
        matrix: Rows of values, with `row_labels` and `column_labels`.
        row_labels: One per row of `matrix`.
        column_labels: One per column of `matrix`.
        unit: Of the y values, bars or cells, as in `Figure.unit`.
        styles: How to draw a series that is not a plain `line`: `smooth` is thin with its running average thick over
            it, `points` is marked points joined by a thin line. One for a series that is not there does no harm.
        x_scale: `auto` is logarithmic where the x values are spaced that way.
        y_scale: `auto` is logarithmic where positive values span more than three decades.
        note: A sentence under the plot.
        below: A second line plot to draw small under this one, over the same x axis.
    """

    __pydantic_config__ = {"extra": "forbid"}

    title: str
    kind: Literal["line", "bar", "heatmap"]
    x: str = ""
    y: str = ""
    series: Mapping[str, tuple[Sequence[float | int | str], Sequence[float]]] = field(default_factory=dict)
    matrix: Sequence[Sequence[float]] = ()
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    unit: str = ""
    styles: Mapping[str, Style] = field(default_factory=dict)
    x_scale: Scale = "auto"
    y_scale: Scale = "auto"
    note: str = ""
    below: Plot | None = None


@dataclass
class Sample:
    """One generated example: what was asked, what was expected, and what each model said.

    Attributes:
        prompt: As the model saw it.
        expected: The right answer; empty where there is none.
        outputs: `{model: answer}`, in the order in which to show them: `before`, `after`.
        correct: `{model: whether its answer counts as right}`; a model that is left out was not judged.
        group: Of the row.
    """

    __pydantic_config__ = {"extra": "forbid"}

    prompt: str
    expected: str
    outputs: Mapping[str, str]
    correct: Mapping[str, bool] = field(default_factory=dict)
    group: str = ""


@dataclass
class Listing:
    """A text to keep with the result and to show only when asked: the recipe, say."""

    __pydantic_config__ = {"extra": "forbid"}

    title: str
    text: str


@dataclass
class Report:
    """A result that can be shown on a terminal, as JSON and as one HTML page.

    Attributes:
        title: What was done.
        figures: The numbers that matter most, by the name to show; a bare value is a `Figure` with no unit.
        tables: In the order in which to show them.
        plots: In the order in which to show them.
        samples: In the order in which to show them.
        notes: Sentences a reader should not miss.
        details: Anything else that belongs into the JSON; not shown.
        summary: One sentence under the title: what was trained, on what, with which method.
        warnings: Sentences about what may be wrong with the result; shown before anything else.
        listings: Texts shown when asked for.
    """

    __pydantic_config__ = {"extra": "forbid"}

    title: str
    figures: dict[str, Figure | Value] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)

    def figure(self, name: str) -> Figure:
        """The key figure of that name, also where only its value was given.

        Raises:
            TunesmithError: there is none of that name.
        """
        if name not in self.figures:
            hint = did_you_mean(name, self.figures)
            raise TunesmithError(f"the report has no figure {name!r}.{hint} It has {', '.join(self.figures)}.")
        held = self.figures[name]
        return held if isinstance(held, Figure) else Figure(held)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps(..., allow_nan=False)`.

        Numbers that are not finite become `"NaN"`, `"Infinity"` and `"-Infinity"`; scalars and arrays of numpy and
        torch become numbers and lists; half of a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD.

        Raises:
            TunesmithError: something is not data; the message names where it stands.
        """
        content = plain(self, "")
        content["figures"] = {
            plain(str(name), "figures"): plain(self.figure(name), f"figures.{name}") for name in self.figures
        }
        return {"schema_version": SCHEMA_VERSION, **content}


def plain(value: Any, where: str) -> Any:
    """`value` as what JSON can hold; `where` is its place, for the error message."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else non_finite(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), _join(where, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(key), where): plain(entry, _join(where, str(key))) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(entry, _join(where, str(i))) for i, entry in enumerate(value)]
    # Scalars and arrays of numpy and torch, without importing either.
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    raise TunesmithError(
        f"report: {where or 'the report'} is a {type(value).__name__} ({value!r:.80}), which JSON cannot hold. "
        "Give text, a number, a boolean, None, or a list or mapping of these."
    )


def non_finite(value: float) -> str:
    """`NaN`, `Infinity` or `-Infinity`, as JavaScript's `Number` and Python's `float` read them."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
