"""`tunesmith evidence`: run the claims, and show what held."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="The experiments behind the parts: run them, or show the committed results.", no_args_is_help=True
)
SLUGS = typer.Argument(None, help="Names of parts.")
ROOM = typer.Option(None, "--room", help="All parts of a room.")
ALL = typer.Option(False, "--all", help="All parts.")
EXACT = typer.Option(False, "--exact", help="Only the exact checks, which take seconds; nothing is written.")
CHECK = typer.Option(False, "--check", help="Only say whether docs/evidence.md is up to date.")


@app.command("run")
def run(slugs: list[str] | None = SLUGS, room: str | None = ROOM, every: bool = ALL, exact: bool = EXACT) -> None:
    """Run claims and write their results where the table is made from."""
    from tunesmith.cli.common import quiet
    from tunesmith.evidence.runner import choose, run_claims

    chosen = choose(slugs or [], room, every)
    quiet()
    if not run_claims(chosen, exact_only=exact):
        raise typer.Exit(1)


@app.command("table")
def table(check: bool = CHECK) -> None:
    """Write docs/evidence.md from the committed results; a stale or missing result is marked there."""
    from tunesmith.evidence.table import DOCUMENT, render

    text = render()
    if check:
        if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != text:
            typer.echo(f"{DOCUMENT} is not what the results say; run `tunesmith evidence table`", err=True)
            raise typer.Exit(1)
        return
    from tunesmith.core.files import write_text

    write_text(DOCUMENT, text)
    typer.echo(f"wrote {DOCUMENT}")
