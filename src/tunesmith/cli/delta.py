"""`tunesmith delta`: changes of few entries, as files."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Changes of few entries of a model as one small file: take them from a tuned model, apply and add them, "
    "look at them.",
)

TUNED = typer.Argument(help="A tuned model, or an adapter whose change is of few entries (spiel, sara, s2ft).")
BASE = typer.Option(None, "--base", help="The model that it was tuned from; not needed for an adapter.")
FILE = typer.Option(..., "--output", help="File to write, such as skill.safetensors.")
KEEP = typer.Option(
    None, "--keep", help="Only the largest changes: a number of entries, or a share of all such as 0.01."
)
ABOVE = typer.Option(0.0, "--above", help="Only changes above this size.")
DELTAS = typer.Argument(help="Delta files, or folders with a delta.safetensors; several are added up.")
ON = typer.Option(..., "--base", help="The model that they are relative to.")
FOLDER = typer.Option(..., "--output", help="Folder for the model.")
SCALE = typer.Option(1.0, "--scale", help="Factor on the change; -1 for its opposite.")
TOP = typer.Option(12, "--top", help="How many tensors to list.")


@app.command("extract")
def extract(
    tuned: str = TUNED, base: str | None = BASE, output: Path = FILE, keep: float | None = KEEP, above: float = ABOVE
) -> None:
    """Write what a tuned model changes of its base, all of it or its largest entries."""
    from tunesmith.cli.common import quiet

    quiet()
    from tunesmith.engine.delta import extract as work

    amount = int(keep) if keep is not None and keep >= 1 else keep
    found = work(tuned, output, base=base, keep=amount, above=above)
    typer.echo(f"{output}: {found.count:,} entries of {len(found)} tensors, {_size(found.nbytes)}")


@app.command("apply")
def apply(deltas: list[str] = DELTAS, base: str = ON, output: Path = FOLDER, scale: float = SCALE) -> None:
    """Write the base with one delta or the sum of several; another base is refused."""
    from tunesmith.cli.common import quiet

    quiet()
    from tunesmith.engine.delta import apply as work

    typer.echo(f"{work(deltas, output, base=base, scale=scale)}: a transformers model folder")


@app.command("info")
def info(deltas: list[str] = DELTAS, top: int = TOP) -> None:
    """What a delta changes, tensor by tensor; and for several, how much they have in common."""
    from rich.console import Console
    from rich.table import Table

    from tunesmith.engine.delta import read

    held, console = [read(name) for name in deltas], Console()
    for name, delta in zip(deltas, held, strict=True):
        made = ", ".join(f"{key}: {value}" for key, value in delta.about.items()) or "nothing said of its making"
        console.print(f"{name}: {delta.count:,} entries, norm {delta.norm():.4g}, {_size(delta.nbytes)} ({made})")
        table = Table("tensor", "entries", "share", "largest", "norm")
        for column in table.columns[1:]:
            column.justify = "right"
        ordered = sorted(delta.items(), key=lambda pair: -len(pair[1]))
        for tensor, entries in ordered[:top]:
            size = 1
            for side in entries.shape:
                size *= side
            largest, norm = float(entries.values.abs().max()), float(entries.values.double().norm())
            table.add_row(tensor, f"{len(entries):,}", f"{len(entries) / size:.2%}", f"{largest:.3g}", f"{norm:.3g}")
        if len(ordered) > top:
            table.add_row(f"... and {len(ordered) - top} more", "", "", "", "")
        console.print(table)
        for tensor, value in delta.whole.items():
            console.print(f"whole: {tensor} {tuple(value.shape)}")
    if len(held) > 1:
        table = Table("share of the column's entries that the row has too", *deltas)
        for name, one in zip(deltas, held, strict=True):
            table.add_row(name, *(f"{one.overlap(other):.1%}" for other in held))
        console.print(table)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
