"""The pipeline contract, for every part of the room: resumable, repeatable, refused where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.train.conftest import data_file, model_folder  # noqa: F401
from tests.zoo import same
from tunesmith import catalog
from tunesmith.core.part import PIPELINE_ROOMS, Part
from tunesmith.core.pipeline import Workshop
from tunesmith.core.report import Report
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.engine.workshop import Bench
from tunesmith.errors import CheckpointError
from tunesmith.recipe import Recipe, load
from tunesmith.train import run

PIPELINES = pytest.mark.parametrize(
    "part", [part for room in PIPELINE_ROOMS for part in catalog.in_room(room)], ids=lambda p: p.slug
)


@pytest.fixture
def recipe(model_folder: Callable[[str], Path], data_file: Path, tmp_path: Path) -> Callable[..., Recipe]:  # noqa: F811
    def make(output: str = "pipeline", **overrides: Any) -> Recipe:
        fields = {
            "model": str(model_folder("llama")),
            "data.train": str(data_file),
            "output": str(tmp_path / output),
            "train.steps": 3,
            "train.batch_size": 4,
            "train.learning_rate": 1e-2,
            "report.generate_rows": 2,
            "report.forgetting": False,
            "report.max_new_tokens": 4,
        }
        return load(None, {**fields, **overrides})

    return make


def tensors(folder: str) -> dict[str, dict[str, Any]]:
    """Every file of weights that a pipeline leaves outside of checkpoints."""
    files = (f for f in Path(folder).rglob("*.safetensors") if "checkpoints" not in f.parts)
    return {str(f.relative_to(folder)): load_file(f) for f in files}


class StoppedError(Exception):
    pass


@PIPELINES
def test_a_pipeline_ends_with_a_report_and_goes_on_where_it_was_stopped(
    part: Part, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(part.target.brisk)
    whole = recipe("whole")
    found = run_pipeline(part.slug, whole, options, run)
    assert isinstance(found, Report)
    assert found.figures or found.tables
    assert (Path(whole.output) / "report.html").exists()
    expected = tensors(whole.output)
    assert expected, "a pipeline leaves a model"

    seen: set[str] = set()

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def stage(self: Workshop, name: str, *args: Any, **kwargs: Any) -> Any:
            seen.add(name)
            if len(seen) == 3:
                raise StoppedError
            return real(self, name, *args, **kwargs)

        return stage

    monkeypatch.setattr(Bench, "do", stopping(Bench.do))
    monkeypatch.setattr(Bench, "train", stopping(Bench.train))
    stopped = recipe("stopped")
    with pytest.raises(StoppedError):
        run_pipeline(part.slug, stopped, options, run)
    monkeypatch.undo()
    run_pipeline(part.slug, stopped, options, run, resume=True)
    again = tensors(stopped.output)
    assert again.keys() == expected.keys()
    assert all(same(again[name], expected[name]) for name in expected)


@PIPELINES
def test_a_folder_of_another_pipeline_is_refused(part: Part, recipe: Callable[..., Recipe]) -> None:
    asked = recipe()
    Path(asked.output).mkdir()
    (Path(asked.output) / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        run_pipeline(part.slug, asked, part.target.brisk, run, overwrite=True)
    assert (Path(asked.output) / "thesis.tex").read_text() == "precious"
    with pytest.raises(CheckpointError, match="no pipeline to resume"):
        run_pipeline(part.slug, recipe("other"), part.target.brisk, run, resume=True)
