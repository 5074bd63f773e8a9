"""`tunesmith catalog`: what there is."""

from __future__ import annotations

import json

import typer

ROOM = typer.Option(None, "--room", help="One room only, such as `adapters`.")
JSON = typer.Option(False, "--json", help="As JSON, one object per part.")


def catalog(room: str | None = ROOM, as_json: bool = JSON) -> None:
    """List the parts: name, what it does, paper."""
    from tunesmith import catalog as register
    from tunesmith.core.part import ROOMS

    rooms = [room] if room else [r for r in ROOMS if register.in_room(r)]
    chosen = [part for r in rooms for part in register.in_room(r)]
    if as_json:
        fields = ("slug", "room", "title", "paper", "tags", "refuses", "extras")
        typer.echo(json.dumps([{f: getattr(p, f) for f in fields} for p in chosen], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for r in rooms:
        table = Table("name", "what it does", "paper", title=f"{r}: {ROOMS[r]}", title_justify="left", expand=True)
        for part in register.in_room(r):
            table.add_row(part.slug, escape(part.title), part.paper.removeprefix("arXiv:"))
        console.print(table)
    console.print(f"{len(chosen)} parts. `tunesmith show NAME` explains one.", highlight=False)
