"""A report on a terminal: no wider than it, readable without colour and in plain ASCII."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from tunesmith.core.report import Figure, Plot, Report, Sample, Table
from tunesmith.report import layout
from tunesmith.report.drawing import draw
from tunesmith.report.layout import Cell, Column
from tunesmith.report.text import visible
from tunesmith.report.units import Change, change, number, part_of

SAMPLES, ROWS = 3, 40
_TEXT_COLUMN = 36
_SAMPLE_LINES = 2
_ARROWS = {"up": "▲", "down": "▼", "same": "=", "lost": "!"}
_COLOURS = {"better": "green", "worse": "red", "": ""}
_ASCII = str.maketrans({
    "▲": "^", "▼": "v", "…": "...", "–": "-", "µ": "u", "→": "->", "✓": "+", "✗": "x", "↵": "\\n", "·": "-",
})  # fmt: skip


def render(report: Report, console: Console | None = None) -> None:
    """Print a checked report."""
    screen = _Screen(console or Console())
    screen.heading(report.title)
    if report.summary:
        screen.line(report.summary, "dim")
    for warning in report.warnings:
        screen.line(f"Warning: {warning}", "yellow")
    _figures(report, screen)
    if report.notes:
        screen.console.print()
    for note in report.notes:
        screen.line(f"Note: {note}")
    for plot in report.plots:
        _plot(plot, screen)
    for table in report.tables:
        if not table.collapsed:
            _table(table, screen)
    if report.samples:
        screen.heading("Samples")
        for i, sample in enumerate(report.samples[:SAMPLES]):
            _sample(i + 1, sample, screen)
        if len(report.samples) > SAMPLES:
            screen.line(f"… {len(report.samples) - SAMPLES} more in the report", "dim")
    folded = [t.title for t in report.tables if t.collapsed] + [listing.title for listing in report.listings]
    if folded:
        screen.line(f"Also in the report: {', '.join(folded)}.", "dim")


class _Screen:
    """A console that takes any text: nothing in it moves the cursor, is markup, or is missing from the encoding."""

    def __init__(self, console: Console):
        self.console = console
        self.width = console.width
        self.ascii_only = console.options.ascii_only

    def safe(self, text: str, style: str = "") -> Text:
        shown = visible(text).expandtabs(4)
        if self.ascii_only:
            shown = shown.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
        return Text(shown, style=style)

    def print(self, shown: Text | Grid | Padding, no_wrap: bool = False) -> None:
        self.console.print(shown, highlight=False, markup=False, emoji=False, no_wrap=no_wrap)

    def heading(self, text: str) -> None:
        self.console.print()
        self.print(self.safe(text, "bold"))

    def line(self, text: str, style: str = "") -> None:
        self.print(self.safe(text, style))


def _moved(moved: Change | None, screen: _Screen) -> Text:
    if moved is None:
        return Text("")
    words = f"{_ARROWS[moved.direction]} {moved.text} {moved.verdict}".rstrip()
    return screen.safe(words, _COLOURS[moved.verdict])


def _figures(report: Report, screen: _Screen) -> None:
    groups = layout.groups(report)
    if not groups:
        return
    figures = [figure for group in groups for figure in group.figures.values()]
    compared = any(figure.before is not None for figure in figures)
    grid = Grid(box=None, padding=(0, 2, 0, 0), show_header=compared, header_style="dim")
    grid.add_column("", overflow="fold")
    if compared:
        grid.add_column("before", justify="right", overflow="fold")
    grid.add_column("after" if compared else "", justify="right", overflow="fold")
    grid.add_column("change" if compared else "", overflow="fold")
    for group in groups:
        if group.heading:
            grid.add_row(screen.safe(group.heading, "bold"))
        for name, figure in group.figures.items():
            grid.add_row(*_figure_row(name, figure, screen, compared))
    screen.console.print()
    screen.print(grid)


def _figure_row(name: str, figure: Figure, screen: _Screen, compared: bool) -> list[Text]:
    unit, free = layout.split_unit(figure)
    last = [_moved(change(figure), screen), screen.safe(part_of(figure))]
    row = [screen.safe(f"{name}, {free}" if free else name)]
    if compared:
        row.append(screen.safe("" if figure.before is None else number(figure.before, unit), "dim"))
    return [*row, screen.safe(number(figure.value, unit), "bold"), Text("  ").join(t for t in last if t.plain)]


def _plot(plot: Plot, screen: _Screen) -> None:
    screen.heading(plot.title)
    lines = draw(plot, screen.width, screen.ascii_only)
    for line in lines or ["(nothing to draw)"]:
        if line:
            screen.print(screen.safe(line), no_wrap=True)
    if plot.note:
        screen.line(plot.note, "dim")


def _table(table: Table, screen: _Screen) -> None:
    screen.heading(table.title)
    columns = layout.columns(table)
    for shown in _pages(columns, screen.width):
        grid = Grid(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
        for column in shown:
            heading = screen.safe(_heading(column, any(c.part for c in shown)))
            grid.add_column(heading, justify="right" if column.numeric else "left", overflow="fold")
        for i in range(min(len(table.rows), ROWS)):
            grid.add_row(*(_cell(column.cells[i], screen) for column in shown))
        screen.print(grid)
    if not table.rows:
        screen.line("no rows", "dim")
    if len(table.rows) > ROWS:
        screen.line(f"… {len(table.rows) - ROWS} more in the report", "dim")
    if table.note:
        screen.line(table.note, "dim")


def _cell(cell: Cell, screen: _Screen) -> Text:
    return _moved(cell.moved, screen) if cell.moved else screen.safe(cell.text)


def _heading(column: Column, two_lines: bool) -> str:
    """The heading over the first of the columns that share it, and the part below."""
    over = column.heading if column.part in ("", "before") else ""
    if not two_lines:
        return over
    return f"{over}\n{column.part}" if column.part else f"\n{over}"


def _pages(columns: list[Column], width: int) -> list[list[Column]]:
    """The columns in as many tables as it takes for numbers not to break; the first column leads each."""
    blocks: list[list[Column]] = []
    for column in columns:
        if column.part in ("after", "change"):
            blocks[-1].append(column)
        else:
            blocks.append([column])
    pages: list[list[Column]] = []
    for block in blocks:
        fits = sum(map(_natural, [*(pages[-1] if pages else []), *block])) <= width
        # Alone on its page, the first column would say nothing.
        if pages and (fits or len(pages[-1]) == len(blocks[0])):
            pages[-1] += block
        else:
            pages.append([*blocks[0], *block] if pages else list(block))
    return pages


def _natural(column: Column) -> int:
    """Cells that the column takes, its gap included; text may be broken."""
    over = max((cell_len(line) for line in _heading(column, True).split("\n")), default=0)
    widest = max((cell_len(_told(cell)) for cell in column.cells), default=0)
    return max(over, widest if column.numeric else min(widest, _TEXT_COLUMN)) + 2


def _told(cell: Cell) -> str:
    return f"{cell.text} {cell.moved.verdict}  " if cell.moved else visible(cell.text)


def _sample(place: int, sample: Sample, screen: _Screen) -> None:
    grid = Grid(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", max_width=screen.width // 3, overflow="fold")
    grid.add_column(overflow="fold")
    room = max(screen.width * 2 // 3 - 4, 10) * _SAMPLE_LINES

    def short(text: str) -> Text:
        if not text.strip():
            return screen.safe("(white space)" if text else "(empty)", "dim")
        shown = screen.safe(text.strip("\n").replace("\n", "↵"))
        shown.truncate(room, overflow="ellipsis")
        return screen.safe(shown.plain)

    grid.add_row(screen.safe(f"{place} {sample.group}".rstrip()), "")
    grid.add_row(screen.safe("prompt"), short(sample.prompt))
    if sample.expected:
        grid.add_row(screen.safe("expected"), short(sample.expected))
    for model, said in sample.outputs.items():
        correct = sample.correct.get(model)
        mark = "" if correct is None else " ✓ correct" if correct else " ✗ incorrect"
        grid.add_row(screen.safe(f"{model}{mark}"), short(said))
    screen.print(grid)
