"""What every rendering of a report has in common: columns of text, groups of figures, the order of the parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.core.report import Figure, Report, Table
from tunesmith.report.units import ABSENT, FORMATTED, Change, change, exact, number, part_of


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell.

    Attributes:
        full: The value with every digit, where `text` is shorter.
        moved: What a change is, in a column of changes.
    """

    text: str
    full: str = ""
    moved: Change | None = None


@dataclass
class Column:
    """A column as it is shown.

    Attributes:
        heading: Shared by the columns that one column of the data became.
        part: `before`, `after` or `change` among those.
        numeric: Whether its cells are set flush right.
    """

    heading: str
    part: str = ""
    numeric: bool = False
    cells: list[Cell] = field(default_factory=list)


def columns(table: Table) -> list[Column]:
    """The table by columns; a column of figures with a `before` becomes three."""
    found: list[Column] = []
    for at, heading in enumerate(table.columns):
        unit = table.units[at] if table.units else ""
        figures = [
            cell if isinstance(cell, Figure) else Figure(cell, unit=unit) for cell in (row[at] for row in table.rows)
        ]
        numeric = any(map(_numeric, figures)) and all(_numeric(f) or f.value is None for f in figures)
        if any(figure.before is not None for figure in figures):
            found += [
                Column(heading, "before", numeric, [value_cell(f, before=True) for f in figures]),
                Column(heading, "after", numeric, [value_cell(f) for f in figures]),
                Column(heading, "change", True, [change_cell(f) for f in figures]),
            ]
        else:
            found.append(Column(heading, "", numeric, [value_cell(f) for f in figures]))
    return found


def _numeric(figure: Figure) -> bool:
    return isinstance(figure.value, float | int) and not isinstance(figure.value, bool)


def value_cell(figure: Figure, before: bool = False) -> Cell:
    """The value, or the one before, with the whole that it is part of."""
    value = figure.before if before else figure.value
    text = number(value, figure.unit)
    whole = "" if before else part_of(figure)
    full = exact(value)
    return Cell(f"{text} {whole}".rstrip(), "" if full == text else full)


def change_cell(figure: Figure) -> Cell:
    """How the value moved; a dash where there is nothing to compare."""
    moved = change(figure)
    return Cell(moved.text if moved else ABSENT, "", moved)


def split_unit(figure: Figure) -> tuple[str, str]:
    """(unit to format the values with, unit to name beside the figure's name): one of them is empty."""
    if figure.unit in FORMATTED:
        return figure.unit, ""
    numeric = _numeric(figure) or isinstance(figure.before, float | int)
    return "", figure.unit if numeric else ""


@dataclass(frozen=True)
class Group:
    """Key figures under one heading."""

    heading: str
    figures: dict[str, Figure]


def groups(report: Report) -> list[Group]:
    """The key figures by heading, in order of first appearance."""
    found: dict[str, dict[str, Figure]] = {}
    for name in report.figures:
        figure = report.figure(name)
        found.setdefault(figure.group, {})[name] = figure
    return [Group(heading, figures) for heading, figures in found.items()]
