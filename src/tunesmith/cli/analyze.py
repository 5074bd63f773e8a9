"""`tunesmith analyze`: what a fine-tune did."""

from __future__ import annotations

from pathlib import Path

import typer

SLUG = typer.Argument(help="A part of the room `analysis`.")
MODEL = typer.Option(..., "--model", help="The tuned model: a model or adapter folder, the folder of a run.")
BASE = typer.Option(None, "--base", help="The model that it was tuned from; an adapter names its own.")
OUTPUT = typer.Option(None, "--output", file_okay=False, help="Folder for report.json and report.html.")
SET = typer.Option(None, "--set", metavar="OPTION=VALUE", help="An option of the analysis.")


def analyze(
    slug: str = SLUG,
    model: str = MODEL,
    base: str | None = BASE,
    output: Path | None = OUTPUT,
    settings: list[str] | None = SET,
) -> None:
    """Look into a tuned model, and show the report."""
    from tunesmith import catalog, report
    from tunesmith.cli.common import assignments, quiet
    from tunesmith.engine.subjects import subjects

    part = catalog.get(slug, "analysis")
    options = part.validate(assignments(settings))
    quiet()
    found = part.target(subjects(model, base), **options)
    report.show(found)
    if output is not None:
        for path in report.save(found, output).values():
            typer.echo(str(path))
