"""`tunesmith compress`: smaller weights."""

from __future__ import annotations

from pathlib import Path

import typer

MODEL = typer.Option(..., "--model", help="A model folder, the folder of a run, an embedded model, or a hub id.")
METHOD = typer.Option(..., "--method", help="A part of the room `compression`.")
OUTPUT = typer.Option(..., "--output", help="Folder for the compressed model.")
DATA = typer.Option(None, "--data", help="Calibration rows, as for `tunesmith train`; the embedded ones if not given.")
ROWS = typer.Option(128, "--rows", min=1, help="How many calibration rows to use.")
LENGTH = typer.Option(512, "--max-length", min=1, help="Of a calibration row, in tokens.")
SET = typer.Option(None, "--set", metavar="OPTION=VALUE", help="An option of the method.")


def compress(
    model: str = MODEL,
    method: str = METHOD,
    output: Path = OUTPUT,
    data: str | None = DATA,
    rows: int = ROWS,
    max_length: int = LENGTH,
    settings: list[str] | None = SET,
) -> None:
    """Compress a model with calibration data, write it as a model folder, and report what it cost."""
    from tunesmith import catalog, report
    from tunesmith.cli.common import assignments, quiet
    from tunesmith.engine.compressing import compress_model

    part = catalog.get(method, "compression")
    options = part.validate(assignments(settings))
    quiet()
    found = compress_model(part.target(**options), model, output, data=data, rows=rows, max_length=max_length)
    report.show(found)
    report.save(found, output)
    typer.echo(str(output))
