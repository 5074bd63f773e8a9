"""Runs that are stopped, and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.engine.callbacks import Meters
from tunesmith.train import run

QUICK = {"train.eval_every": 8, "report.generate_rows": 0, "report.samples": 0, "report.forgetting": False}
"""Of a run whose weights are looked at, and not its report."""


def weights(folder: str | Path) -> dict[str, Tensor]:
    """The result of the run in a folder."""
    (file,) = Path(folder, "model").glob("*.safetensors")
    return load_file(file)


def stopped(fields: dict[str, Any], at: int) -> None:
    """Begin the run, and stop it in the middle of the end of step `at`, as by a key."""
    real = Meters.on_step_end

    def on_step_end(self: Meters, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meters, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            run(None, **fields)


def resumed(fields: dict[str, Any], folder: Path, at: int = 5) -> dict[str, Tensor]:
    """What comes of the same run in another folder, stopped at a step and gone on from its last checkpoint."""
    again = {**fields, "output": str(folder)}
    stopped(again, at)
    run(None, resume=True, **again)
    return weights(folder)
