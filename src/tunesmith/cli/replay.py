"""`tunesmith replay`: a model from the trace of its run."""

from __future__ import annotations

from pathlib import Path

import typer

RUN = typer.Argument(help="The folder of a run whose optimizer kept a trace, such as mezo with checkpoint=trace.")
STEPS = typer.Option(None, "--steps", min=0, help="Replay so many steps; all of them by default.")
FOLDER = typer.Option(..., "--output", help="Folder for the model or adapter.")


def replay(run: Path = RUN, steps: int | None = STEPS, output: Path = FOLDER) -> None:
    """Make the model of a run again, at any of its steps, from a trace of a few kilobytes.

    A run with `--set optimizer.checkpoint=trace --set optimizer.restore=exact` and the optimizer mezo keeps 16 bytes
    per step instead of weights. The base model is loaded as the run's recipe says; other weights are refused.
    """
    from tunesmith.cli.common import quiet

    quiet()
    from tunesmith.train import replay as work

    typer.echo(f"{work(run, output, steps=steps)}: the model after {'all' if steps is None else steps} steps")
