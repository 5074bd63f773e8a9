"""A run that is killed loses no finished checkpoint, and goes on bitwise as if it had not stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fields import field_of
from tests.train.resuming import QUICK, resumed, weights
from tests.zoo import same
from tunesmith import catalog
from tunesmith.core.part import Part
from tunesmith.engine.callbacks import Meters
from tunesmith.errors import CheckpointError
from tunesmith.train import InterruptedRunError, run

OTHERS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"adapters": [{"name": "lora", "dropout": 0.1}]},
    "dept": {"prompts": [{"name": "dept", "num_virtual_tokens": 4, "max_length": 64}]},
    "intuitive-finetuning": {"method": "full", "objective": "intuitive-finetuning"},
    "ba-lora": {"method": "pissa", "regularisers": ["ba-lora"]},
    "mezo-log": {
        "optimizer": {"name": "mezo", "checkpoint": "trace", "restore": "exact"},
        "train.learning_rate": 1e-3,
        "train.max_grad_norm": 0,
    },
}


def small(part: Part) -> dict[str, Any]:
    """A part on a tiny model, what it does over steps within a few steps; masks of dropout differ by process."""
    fixed = {"rank": 2, "dropout": 0.0} if part.room == "adapters" else {}
    options = {**{name: value for name, value in fixed.items() if name in part.options}, **part.target.brisk}
    refuses = part.refusals(part.validate(options))
    fields = field_of(part, **options)
    if (slug := part.implies.get("optimizer")) in catalog.parts():
        fields["optimizer"] = {"name": slug, **catalog.get(slug).target.brisk}
    if "full-finetuning" in refuses:
        fields["method"] = "lora"
    if "forward-only" in part.tags:
        fields["train.learning_rate"] = 1e-3
    if "forward-only" in part.tags or "gradient-clipping" in refuses:
        fields["train.max_grad_norm"] = 0
    return fields


def eligible(part: Part) -> bool:
    return "own-tuner" not in part.tags and not getattr(part.target, "side", ()) and "ddp" not in part.refuses


ROOMS = ("adapters", "schedules", "optimizers")
METHODS = OTHERS | {part.slug: small(part) for room in ROOMS for part in catalog.in_room(room) if eligible(part)}
EVERY = pytest.mark.parametrize("name", METHODS)


# A process that kills itself: at a step, or when a checkpoint is written but has not its name yet.
KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from tunesmith.cli.common import quiet
quiet()
from transformers import TrainerCallback
from tunesmith.core import trainer as core
from tunesmith.engine.callbacks import Meters
fields, where, at = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    real = Meters.on_step_end
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == at:
            die()
        return real(self, args, state, control, **kwargs)
    Meters.on_step_end = on_step_end
else:
    real_replace = core.replace_folder
    def replace(staging, path):
        if path.name == f"checkpoint-{at}":
            die()
        real_replace(staging, path)
    core.replace_folder = replace
from tunesmith.train import run
run(None, **fields)
"""


def killed(fields: dict[str, Any], where: str, at: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(fields), where, str(at)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "mezo-log"])
@pytest.mark.parametrize("where", ["step", "save"])
def test_killed_and_resumed_is_bitwise_the_same(
    name: str, where: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe(**METHODS[name])
    run(None, **fields)
    expected = weights(fields["output"])
    fields["output"] = str(tmp_path / "killed")
    killed(fields, where, 5 if where == "step" else 6)
    held = sorted(p.name for p in Path(fields["output"], "checkpoints").glob("checkpoint-*"))
    assert held == ["checkpoint-2", "checkpoint-4"]
    run(None, resume=True, **fields)
    assert same(weights(fields["output"]), expected)
    assert not list(Path(fields["output"]).rglob(".partial-*"))


@EVERY
def test_stopped_and_resumed_is_bitwise_the_same(
    name: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe(**{**QUICK, **METHODS[name]})
    run(None, **fields)
    expected = weights(fields["output"])
    assert same(resumed(fields, tmp_path / "stopped", 5), expected)


def test_a_signal_writes_a_checkpoint_and_resuming_goes_on(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = recipe(method="full")
    run(None, **fields)
    expected = weights(fields["output"])
    fields["output"] = str(tmp_path / "interrupted")
    real = Meters.on_step_end

    def on_step_end(self: Meters, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Meters, "on_step_end", on_step_end)
    with pytest.raises(InterruptedRunError, match=r"stopped at step 3.*--resume"):
        run(None, **fields)
    monkeypatch.undo()
    assert Path(fields["output"], "checkpoints", "checkpoint-3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(None, resume=True, **fields)
    assert same(weights(fields["output"]), expected)


def test_a_folder_with_a_finished_run_is_refused_and_can_be_replaced(recipe: Callable[..., dict[str, Any]]) -> None:
    fields = recipe(method="full", **{"train.steps": 2})
    run(None, **fields)
    with pytest.raises(CheckpointError, match=r"holds a run of this recipe already.*--resume.*--overwrite"):
        run(None, **fields)
    run(None, overwrite=True, **fields)
    other = {**fields, "train.batch_size": 2}
    with pytest.raises(CheckpointError, match=r"another run: its train.batch_size is 4, this recipe's is 2"):
        run(None, resume=True, **other)


def test_a_folder_that_is_no_run_is_refused(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"not empty and not the folder of a run \(thesis.tex\)"):
        run(None, overwrite=True, **recipe())
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_nothing_to_resume(recipe: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match="there is no run to resume"):
        run(None, resume=True, **recipe())
