"""`tunesmith ranks`: which layer has, or should get, how much rank."""

from __future__ import annotations

from pathlib import Path

import typer

SOURCE = typer.Argument(help="An adapter folder or run, to see its ranks; or a model, with --method.")
METHOD = typer.Option(None, "--method", help="Make a table by this method: eva, sensitivity, ...")
DATA = typer.Option(None, "--data", help="Rows to look at, as for `tunesmith train`.")
RANK = typer.Option(None, "--rank", min=1, help="The mean rank over the layers, for methods that have one.")
OUTPUT = typer.Option(None, "--output", dir_okay=False, help="A JSON file that any low-rank adapter takes as `ranks`.")
SET = typer.Option(None, "--set", metavar="OPTION=VALUE", help="A further option of the method.")


def ranks(
    source: str = SOURCE,
    method: str | None = METHOD,
    data: str | None = DATA,
    rank: int | None = RANK,
    output: Path | None = OUTPUT,
    settings: list[str] | None = SET,
) -> None:
    """Show the rank of each layer, or share out ranks over a model's layers.

    The file that --output writes goes into a recipe: `adapters: [{name: dylora, ranks: ranks.json}]`.
    """
    from rich.console import Console
    from rich.table import Table

    from tunesmith.cli.common import assignments, quiet
    from tunesmith.errors import RecipeError
    from tunesmith.recipe import load

    quiet()
    from tunesmith.engine.ranks import by_method, of_adapter

    if method is None:
        for given, name in ((data, "--data"), (rank, "--rank"), (settings, "--set")):
            if given is not None:
                raise RecipeError(f"{name} says how to make a table; name the method too (--method)")
        found = of_adapter(source)
    else:
        recipe = load(None, {"model": source, **({"data.train": data} if data else {})})
        found = by_method(recipe, method, {**assignments(settings), **({"rank": rank} if rank else {})})
    columns, rows = found.rows()
    table = Table(*columns, title=f"ranks ({found.source})", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    total, used = sum(found.values()), sum(r > 0 for r in found.values())
    typer.echo(f"{total} in all, over {used} of {len(found)} layers")
    if output is not None:
        found.save(output)
        typer.echo(f"{output}: give it to an adapter as `ranks`")
