"""Showing a `Report`: on a terminal, as `report.json`, and as one HTML page that needs nothing else.

    from tunesmith import report

    report.show(found)                       # the terminal
    report.save(found, "runs/first")         # runs/first/report.json and report.html
    found = report.load("runs/first")        # and back
    report.schema()                          # JSON schema of report.json

rich, jinja2, numpy and pydantic are imported when first used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.files import write_text
from tunesmith.core.report import Report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["load", "save", "schema", "show", "to_html"]

JSON_NAME = "report.json"
HTML_NAME = "report.html"


def show(report: Report, console: Console | None = None) -> None:
    """Print the report, no wider than the console.

    Args:
        report: What to show.
        console: Where; None for standard output. Colour is left out for `NO_COLOR` and in pipes.

    Raises:
        TunesmithError: the report contradicts itself; the message names the field.
    """
    from tunesmith.report.document import clean
    from tunesmith.report.terminal import render

    render(clean(report), console)


def save(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write `report.json` and `report.html` into `folder`; neither is ever half-written.

    Returns:
        `{"json": path, "html": path}`.

    Raises:
        TunesmithError: the report contradicts itself or holds what JSON cannot; nothing has been written then.
    """
    from tunesmith.report.document import clean, write
    from tunesmith.report.page import render

    checked = clean(report)
    content = write(checked.to_json()) + "\n"
    page = render(checked)
    folder = Path(folder)
    return {"json": write_text(folder / JSON_NAME, content), "html": write_text(folder / HTML_NAME, page)}


def load(path: str | Path) -> Report:
    """Read a `report.json`, given the file or its folder.

    Raises:
        TunesmithError: the file is missing, is not JSON, or is not a report; the message names the field.
    """
    from tunesmith.report.document import read

    return read(Path(path))


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `report.json`."""
    from tunesmith.report.document import build

    return build()


def to_html(report: Report) -> str:
    """The page as text: one document, without scripts, that fetches nothing.

    Raises:
        TunesmithError: the report contradicts itself; the message names the field.
    """
    from tunesmith.report.document import clean
    from tunesmith.report.page import render

    return render(clean(report))
