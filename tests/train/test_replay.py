"""A trace of a few kilobytes instead of checkpoints with weights, and any step of a run made again from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.train.test_resume import METHODS
from tests.zoo import same
from tunesmith.cli.main import app
from tunesmith.core.trace import Trace
from tunesmith.errors import CheckpointError, RecipeError, TunesmithError
from tunesmith.train import replay, run

Recipe = Callable[..., dict[str, Any]]
LOG = METHODS["mezo-log"]


def weights(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_made_again_is_the_run(method: str, recipe: Recipe, tmp_path: Path) -> None:
    fields = recipe(**LOG, method=method)
    run(None, **fields)
    folder = Path(fields["output"])
    assert not list(folder.glob("checkpoints/*/model*")) + list(folder.glob("checkpoints/*/adapter*"))
    assert len(Trace.load(folder / "trace.safetensors")) == 8
    assert all(file.stat().st_size < 3000 for file in folder.rglob("trace.safetensors"))
    assert same(weights(replay(folder, tmp_path / "again")), weights(folder / "model"))
    half = recipe(**LOG, method=method, **{"train.steps": 4, "train.lr_schedule": "constant", "train.warmup": 0})
    whole = {**half, "train.steps": 8, "output": str(tmp_path / "whole")}
    half["output"] = str(tmp_path / "half")
    for one in (half, whole):
        run(None, **one)
    assert same(weights(replay(whole["output"], tmp_path / "at4", steps=4)), weights(tmp_path / "half" / "model"))


def test_an_unfinished_run_on_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    fields = recipe(**LOG)
    run(None, **fields)
    folder = Path(fields["output"])
    expected = weights(folder / "model")
    (folder / "trace.safetensors").unlink()  # as it is before the end; the last checkpoint has it
    done = CliRunner().invoke(app, ["replay", str(folder), "--output", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert "the model after all steps" in done.output
    assert same(weights(tmp_path / "again"), expected)
    with pytest.raises(CheckpointError, match="not empty"):
        replay(folder, tmp_path / "again")


def test_other_weights_and_missing_steps_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    fields = recipe(**LOG)
    run(None, **fields)
    folder = Path(fields["output"])
    with pytest.raises(CheckpointError, match=r"has 8 steps; steps=9"):
        replay(folder, tmp_path / "more", steps=9)
    shifted = tmp_path / "shifted"
    source = Path(fields["model"])
    shifted.mkdir()
    for file in source.iterdir():
        (shifted / file.name).write_bytes(file.read_bytes())
    run(None, **recipe(method="full", output=str(tmp_path / "other"), model=str(source), **{"train.steps": 2}))
    (shifted / "model.safetensors").write_bytes((tmp_path / "other" / "model" / "model.safetensors").read_bytes())
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(str(source), str(shifted)))
    with pytest.raises(CheckpointError, match=r"weights have the fingerprint .*the model that the run began with"):
        replay(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_does_not_go_together(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="take restore='exact'"):
        run(None, **recipe(**{**LOG, "optimizer": {"name": "mezo", "checkpoint": "trace"}}))
    plain = recipe(method="lora", output=str(tmp_path / "plain"))
    run(None, **plain)
    with pytest.raises(CheckpointError, match=r"has no trace.safetensors.*checkpoint='trace'"):
        replay(plain["output"], tmp_path / "again")


def test_the_best_of_checkpoints_without_weights_cannot_be_loaded(recipe: Recipe, monkeypatch: Any) -> None:
    from tunesmith.engine import building

    real = building.Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.args.load_best_model_at_end = True
        return real(self, *args, **kwargs)

    monkeypatch.setattr(building.Trainer, "train", train)
    with pytest.raises(TunesmithError, match="load_best_model_at_end=True needs checkpoints with weights"):
        run(None, **recipe(**LOG))
