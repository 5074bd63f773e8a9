"""`tunesmith pipeline`: several trainings with decisions between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

SLUG = typer.Argument(help="A part of the rooms `recipes` or `systems`; `tunesmith catalog --room recipes` lists them.")
RECIPE = typer.Argument(None, help="The recipe of a single training, in YAML.", show_default=False)
MODEL = typer.Option(None, "--model", help="A folder, a hub id, or an embedded model.")
DATA = typer.Option(None, "--data", help="As for `tunesmith train`.")
OUTPUT = typer.Option(None, "--output", help="Folder of the pipeline.", show_default="runs/latest")
OPTION = typer.Option(None, "--option", metavar="NAME=VALUE", help="An option of the pipeline (`tunesmith show SLUG`).")
SET = typer.Option(None, "--set", metavar="FIELD=VALUE", help="Any field of the recipe, such as train.batch_size=4.")
RESUME = typer.Option(False, "--resume", help="Go on where it stopped; finished stages are not done again.")
OVERWRITE = typer.Option(False, "--overwrite", help="Replace the pipeline that is in --output.")
PLAIN = typer.Option(False, "--quiet", help="No progress, only the report.")


def pipeline(
    slug: str = SLUG,
    recipe: Path | None = RECIPE,
    model: str | None = MODEL,
    data: str | None = DATA,
    output: str | None = OUTPUT,
    options: list[str] | None = OPTION,
    settings: list[str] | None = SET,
    resume: bool = RESUME,
    overwrite: bool = OVERWRITE,
    quiet: bool = PLAIN,
) -> None:
    """Run a pipeline: rounds of training and data, a search, an estimation before the training, a federation.

    Each of its trainings is a run folder under --output, and every decision is kept there: killed, it goes on by
    --resume.
    """
    from tunesmith.cli.common import assignments
    from tunesmith.cli.common import quiet as quieten
    from tunesmith.recipe import load

    overrides: dict[str, Any] = {"model": model, "data.train": data, "output": output}
    overrides = {key: value for key, value in overrides.items() if value is not None} | assignments(settings)
    asked = load(recipe, overrides)
    asked.check()
    quieten()
    from tunesmith import report
    from tunesmith.engine.pipeline import run_pipeline
    from tunesmith.train import InterruptedRunError, run

    try:
        found = run_pipeline(slug, asked, assignments(options), run, resume=resume, overwrite=overwrite, quiet=quiet)
    except InterruptedRunError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None
    report.show(found)
