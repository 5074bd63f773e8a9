"""The terminal: never wider than it, without control characters, readable in plain ASCII."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from rich.cells import cell_len
from rich.console import Console

from tests.report.example import odd_report, training_report
from tests.report.strategies import LARGE, reports
from tunesmith import report
from tunesmith.core.report import Figure, Plot, Report, Sample, Table


def shown(made: Report, width: int = 80, encoding: str = "utf-8", **options: object) -> str:
    """What is written to a pipe of that encoding."""
    stream = io.BytesIO()
    text = io.TextIOWrapper(stream, encoding=encoding, errors="strict", newline="\n", write_through=True)
    report.show(made, Console(file=text, width=width, **options))
    return stream.getvalue().decode(encoding)


def check(text: str, width: int) -> None:
    for line in text.split("\n"):
        assert cell_len(line) <= width, line
    assert not re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("make", [training_report, odd_report, lambda: Report("")])
def test_no_line_is_wider_than_the_terminal(make: object, encoding: str, width: int) -> None:
    check(shown(make(), width, encoding), width)


@LARGE
@given(reports)
def test_any_report(made: Report) -> None:
    check(shown(made, 80), 80)
    check(shown(made, 80, "ascii"), 80)


def test_a_training_report_says_it_all_on_80_columns() -> None:
    text = shown(training_report())
    for line in (
        "Warning: 37 rows were longer than 1,024 tokens and dropped.",
        "                      before       after  change",
        "exact match            4.7 %      79.7 %  ▲ +75.0 points better",
        "retained knowledge    84.9 %      82.8 %  ▼ -2.1 points worse",
        "trainable parameters             270,336  of 5.64 M (4.8 %)",
        "birthplace    82        2.0 %  83.0 %  ▲ +81.0 points better",
        "before ✗ incorrect  def test_employs(self):↵    return None",
        "… 1 more in the report",
        "Also in the report: Environment, Recipe.",
    ):
        assert f"\n{line}" in text


def test_colour_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in shown(training_report())
    assert "\x1b[32m" in shown(training_report(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in shown(training_report(), force_terminal=True, color_system="standard")


def test_text_is_text() -> None:
    hostile = "[bold]x[/bold] :smile: \x1b[2J\x07"
    table = Table(hostile, [hostile], [[hostile]])
    text = shown(Report(hostile, {hostile: hostile}, [table], samples=[Sample(hostile, hostile, {hostile: hostile})]))
    assert text.replace("\n", " ").count("[bold]x[/bold] :smile: <U+001B>[2J<U+0007>") >= 7


def test_a_curve_is_drawn_from_left_to_right() -> None:
    xs = list(range(101))
    plot = Plot(
        "rise", "line", x="step", y="loss", series={"a": (xs, xs), "b": ([0, 100], [100, 0])}, styles={"b": "points"}
    )
    lines = shown(Report("t", plots=[plot])).split("\n")
    rows = [line.split("│")[1] for line in lines if "│" in line]
    assert len(rows) == 9
    dots = [[j for j, char in enumerate(row) if "\u2800" < char <= "\u28ff"] for row in rows]
    assert max(dots[-1]) < min(dots[0])
    assert (rows[0].index("x"), rows[-1].rindex("x")) == (0, len(rows[0]) - 1)
    ascii_rows = [
        line.split("|")[1] for line in shown(Report("t", plots=[plot]), encoding="ascii").split("\n") if "|" in line
    ]
    assert [bool(row.strip(" x")) for row in ascii_rows] == [bool(row) for row in dots]


def test_bars_are_as_long_as_their_values() -> None:
    plot = Plot("p", "bar", series={"s": (["a", "b", "none"], [10, 5, 0])})
    lines = shown(Report("t", plots=[plot])).split("\n")
    lengths = {line.split()[0]: line.count("█") for line in lines if line.startswith(("a ", "b ", "none"))}
    assert lengths["none"] == 0
    assert lengths["a"] > 60
    assert abs(lengths["a"] - 2 * lengths["b"]) <= 1


def test_a_wide_table_goes_on_below() -> None:
    names = [f"column {i}" for i in range(20)]
    text = shown(Report("t", tables=[Table("wide", ["row", *names], [["first", *range(20)]])]))
    assert all(name in text for name in names)
    assert text.count("first") == text.count("row ") > 1


def test_a_column_of_figures_has_a_heading_over_its_parts() -> None:
    table = Table("t", ["family", "exact match"], [["copy", Figure(0.7, 0.5, "share", "higher")]])
    lines = [line.rstrip() for line in shown(Report("r", tables=[table])).split("\n")]
    at = next(i for i, line in enumerate(lines) if "before" in line)
    assert lines[at].split() == ["family", "before", "after", "change"]
    assert lines[at - 1].strip() == "exact match"


def test_the_console_of_the_process_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(Report("a title", {"loss": 0.5}))
    assert "a title" in capsys.readouterr().out
