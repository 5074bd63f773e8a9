"""`tunesmith merge`: several checkpoints to one."""

from __future__ import annotations

from pathlib import Path

import typer

METHOD = typer.Option(..., "--method", help="A part of the room `merging`.")
MODELS = typer.Option(..., "--model", help="A model to merge; give it once for each.")
BASE = typer.Option(None, "--base", help="The model that they were tuned from, where the method works on differences.")
OUTPUT = typer.Option(..., "--output", help="Folder for the merged model.")
DATA = typer.Option(None, "--data", help="Validation rows, for methods that choose or learn by them.")
SET = typer.Option(None, "--set", metavar="OPTION=VALUE", help="An option of the method.")


def merge(
    method: str = METHOD,
    models: list[str] = MODELS,
    base: str | None = BASE,
    output: Path = OUTPUT,
    data: str | None = DATA,
    settings: list[str] | None = SET,
) -> None:
    """Merge models into one model folder, a tensor at a time."""
    from tunesmith import catalog
    from tunesmith.cli.common import assignments, quiet
    from tunesmith.engine.merge import merge_models

    part = catalog.get(method, "merging")
    options = part.validate(assignments(settings))
    quiet()
    merge_models(part.target(**options), models, output, base=base, data=data)
    typer.echo(str(output))
