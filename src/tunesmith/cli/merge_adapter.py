"""`tunesmith merge-adapter`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path

import typer

ADAPTER = typer.Argument(help="An adapter folder, or the folder of a run.")
OUTPUT = typer.Option(..., "--output", help="Folder for the merged model.")
DTYPE = typer.Option("auto", "--dtype", help="Of the merged weights: auto (the base's), float32, bfloat16, float16.")


def merge_adapter(adapter: str = ADAPTER, output: Path = OUTPUT, dtype: str = DTYPE) -> None:
    """Write the base model with the adapter folded in, as a plain transformers folder."""
    from tunesmith.cli.common import quiet
    from tunesmith.engine.save import save_merged

    quiet()
    save_merged(adapter, output, dtype=dtype)
    typer.echo(f"{output}: a transformers model folder with the adapter folded in")
