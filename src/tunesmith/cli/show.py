"""`tunesmith show`: one part in full."""

from __future__ import annotations

import json
from typing import Any

import typer

SLUG = typer.Argument(help="Name of the part, as `tunesmith catalog` lists it.")
JSON = typer.Option(False, "--json", help="As JSON.")


def show(slug: str = SLUG, as_json: bool = JSON) -> None:
    """Explain a part: paper, equation, options with defaults, what it combines with, its evidence."""
    from tunesmith import catalog
    from tunesmith.core.part import SETTING_TAGS, TAGS
    from tunesmith.evidence import results

    part = catalog.get(slug)
    evidence = results.load(part.slug)
    refuses = dict(part.refuses)
    if as_json:
        options = [
            {"name": o.name, "type": o.type_name, "help": o.help}
            | ({"required": True} if o.required else {"required": False, "default": o.default})
            for o in part.options.values()
        ]
        content: dict[str, Any] = {"slug": slug, "room": part.room, "paper": part.paper, "doc": part.doc}
        content |= {"options": options, "tags": list(part.tags), "refuses": refuses, "evidence": evidence}
        typer.echo(json.dumps(content, indent=2, default=str))
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{part.slug}[/]  ({part.room})  {part.paper}\n", highlight=False)
    console.print(part.doc.strip(), highlight=False, markup=False)
    if part.options:
        table = Table("option", "type", "default", "meaning", title="\noptions", title_justify="left")
        for option in part.options.values():
            default = "required" if option.required else str(option.default)
            table.add_row(option.name, *(escape(text) for text in (option.type_name, default, option.help)))
        console.print(table)
    says = [TAGS[tag] for tag in part.tags]
    if says:
        console.print(f"It {'; '.join(says)}.", highlight=False)
    for key, reason in refuses.items():
        console.print(f"Not with {SETTING_TAGS.get(key, TAGS.get(key, key))}: {reason}.", highlight=False, markup=False)
    if not refuses:
        console.print("It refuses no other part or setting.", highlight=False)
    console.print(Markdown(results.summary(part.slug, evidence)))
