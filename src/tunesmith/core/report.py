"""What a run or an analysis found, as data: figures, tables and plots. `tunesmith.report` renders it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Value = float | int | str | bool | None


@dataclass
class Table:
    """Rows under named columns.

    Attributes:
        columns: Headings, with the unit where there is one.
        rows: One sequence of values per row, as long as `columns`.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Value]] = field(default_factory=list)
    note: str = ""


@dataclass
class Plot:
    """A picture to draw.

    Attributes:
        kind: `line` and `bar` use `series`; `heatmap` uses `matrix`.
        series: `{label: (x values, y values)}`.
        matrix: Rows of values, with `row_labels` and `column_labels`.
    """

    title: str
    kind: Literal["line", "bar", "heatmap"]
    x: str = ""
    y: str = ""
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]] = field(default_factory=dict)
    matrix: Sequence[Sequence[float]] = ()
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()


@dataclass
class Sample:
    """One generated example: what was asked, what was expected, and what each model said."""

    prompt: str
    expected: str
    outputs: Mapping[str, str]


@dataclass
class Report:
    """A result that can be shown on a terminal, as JSON and as one HTML page.

    Attributes:
        title: What was done.
        figures: The numbers that matter most, by name.
        tables, plots, samples: The rest, in the order in which to show it.
        notes: Sentences a reader should not miss.
        details: Anything else that belongs into the JSON.
    """

    title: str
    figures: dict[str, Value] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return asdict(self)
