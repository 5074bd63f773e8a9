"""`tunesmith train`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

RECIPE = typer.Argument(None, help="A recipe in YAML. Nothing at all runs the embedded default.", show_default=False)
MODEL = typer.Option(None, "--model", help="A folder, a hub id, or an embedded model (tiny-lm-m, tiny-lm-s).")
DATA = typer.Option(None, "--data", help="JSONL, JSON, CSV, Parquet, a `datasets` or image folder, or a hub id.")
EVAL = typer.Option(None, "--eval", help="The same for evaluation; without it a tenth of the rows is kept aside.")
METHOD = typer.Option(None, "--method", help="A part that trains (`tunesmith catalog`), `lora`, or `full`.")
TASK = typer.Option(None, "--task", help="causal-lm, seq2seq, text-classification or image-classification.")
OUTPUT = typer.Option(None, "--output", help="Folder of the run.", show_default="runs/latest")
STEPS = typer.Option(None, "--steps", help="Optimizer steps.", show_default="three passes over the data")
SET = typer.Option(None, "--set", metavar="FIELD=VALUE", help="Any field of the recipe, such as train.batch_size=4.")
SKIP = typer.Option(False, "--skip-bad-rows", help="Leave out rows that cannot be read, and list them.")
RESUME = typer.Option(False, "--resume", help="Go on from the last checkpoint in --output.")
OVERWRITE = typer.Option(False, "--overwrite", help="Replace the run that is in --output.")
FIELDS = typer.Option(False, "--fields", help="List every field of a recipe with default and meaning, and stop.")
PLAIN = typer.Option(False, "--quiet", help="No progress, only the report.")


def train(
    recipe: Path | None = RECIPE,
    model: str | None = MODEL,
    data: str | None = DATA,
    evaluation: str | None = EVAL,
    method: str | None = METHOD,
    task: str | None = TASK,
    output: str | None = OUTPUT,
    steps: int | None = STEPS,
    settings: list[str] | None = SET,
    skip_bad_rows: bool = SKIP,
    resume: bool = RESUME,
    overwrite: bool = OVERWRITE,
    fields: bool = FIELDS,
    quiet: bool = PLAIN,
) -> None:
    """Fine-tune a model on your rows, and report what it did.

    The rows may have `text`; or `prompt` and `completion`; or `messages`; or `text` and `label`; or `image` and
    `label`. Other column names are mapped: `--set data.columns="{prompt: question, completion: answer}"`.
    """
    if fields:
        _list_fields()
        return
    from tunesmith.cli.common import assignments
    from tunesmith.cli.common import quiet as quieten
    from tunesmith.recipe import load

    overrides: dict[str, Any] = {
        "model": model,
        "data.train": data,
        "data.eval": evaluation,
        "method": method,
        "task": task,
        "output": output,
        "train.steps": steps,
        "data.skip_bad_rows": skip_bad_rows or None,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None} | assignments(settings)
    asked = load(recipe, overrides)
    asked.check()
    quieten()
    from tunesmith.train import InterruptedRunError, run

    try:
        run(asked, resume=resume, overwrite=overwrite, quiet=quiet, show=True)
    except InterruptedRunError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None


def _list_fields() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tunesmith.docs import fields

    table = Table("field", "default", "meaning")
    for row in fields():
        table.add_row(*(escape(text) for text in row))
    Console().print(table)
