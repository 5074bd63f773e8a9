"""`tunesmith export`: an adapter in a form that needs no Tunesmith."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Form(StrEnum):
    lora = "lora"
    sparse = "sparse"
    merged = "merged"


ADAPTER = typer.Argument(help="An adapter folder, or the folder of a run.")
AS = typer.Option(
    Form.lora,
    "--as",
    help="A plain LoRA folder, for changes of low rank; a delta file, for changes of few entries; or a whole model.",
)
OUTPUT = typer.Option(..., "--output", help="Folder to write; a file for a delta.")
SET = typer.Option(
    None, "--set", metavar="NAME=VALUE", help="Which of several, where an adapter is several: rank=4 for dylora."
)


def export(adapter: str = ADAPTER, form: Form = AS, output: Path = OUTPUT, settings: list[str] | None = SET) -> None:
    """Write an adapter as a plain LoRA, which PEFT and inference servers load; as a delta; or folded into its base."""
    from tunesmith.cli.common import assignments, quiet

    quiet()
    from tunesmith.engine.save import save_lora, save_merged

    choice = assignments(settings)
    if form is Form.merged:
        save_merged(adapter, output, choice=choice)
        typer.echo(f"{output}: a transformers model folder with the adapter folded in")
        return
    if form is Form.sparse:
        from tunesmith.engine.delta import extract

        typer.echo(f"{output}: {extract(adapter, output).count:,} entries; `tunesmith delta` applies and adds them")
        return
    save_lora(adapter, output, choice=choice)
    typer.echo(f"{output}: a plain LoRA folder; PEFT, transformers and vLLM load it on the original model")
