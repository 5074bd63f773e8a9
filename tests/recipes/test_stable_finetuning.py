"""What is special to the grid of stabilisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from tests.train.conftest import data_file, model_folder, write_rows  # noqa: F401
from tunesmith import report as reports
from tunesmith.core.pipeline import Trained
from tunesmith.core.report import Figure, Report
from tunesmith.engine import workshop as engine
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, load
from tunesmith.recipes.stable_finetuning import KNOWN, StableFinetuning
from tunesmith.train import run

PLAIN = {"train": {"steps": 10, "epochs": None}}
FULL = {"method": "full", "adapters": [], "prompts": []}
QUIET = {"report.forgetting": False, "report.generate_rows": 0, "report.samples": 0}


@pytest.fixture
def recipe(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Recipe]:  # noqa: F811
    def make(output: str = "grid", **overrides: Any) -> Recipe:
        rows = [{"text": "abc def"[: 3 + i % 4], "label": ("good", "bad")[i % 3 == 0]} for i in range(24)]
        fields = {
            "model": str(model_folder("bert")),
            "data.train": str(write_rows(tmp_path / "rows.jsonl", rows)),
            "data.eval": str(write_rows(tmp_path / "eval.jsonl", rows[:9])),
            "output": str(tmp_path / output),
            "train.steps": 2,
            "train.batch_size": 4,
            "train.seed": 5,
        }
        return load(None, {**fields, **overrides})

    return make


def test_what_each_stabiliser_is() -> None:
    grid = StableFinetuning(layer_decay=0.8, fresh_blocks=2, longer=3)

    def fields(name: str, recipe: Any = PLAIN) -> dict[str, Any]:
        found = grid.overrides(name, 7, recipe, 12)
        common = {**FULL, **QUIET, "train.seed": 7}
        assert common.items() <= found.items()
        return {k: v for k, v in found.items() if k not in common}

    decay = {"name": "layer-decay", "layer_decay": 0.8, "bias_correction": True}
    fresh = {"name": "fresh-top", "blocks": 2, "seed": 7}
    assert fields("plain") == {}
    assert fields("uncorrected") == {"optimizer": {**decay, "layer_decay": 1.0, "bias_correction": False}}
    assert fields("decay") == {"optimizer": decay}
    assert fields("freeze") == {"schedule": {"name": "telly", "blocks": 6}}
    assert fields("fresh") == {"schedule": {**fresh, "frozen": None}}
    assert fields("longer") == {"train.steps": 30, "train.warmup": 0.1}
    assert fields("longer", {"train": {"steps": None, "epochs": None}}) == {"train.epochs": 9.0, "train.warmup": 0.1}
    assert fields("freeze+fresh+decay+uncorrected") == {
        "schedule": {**fresh, "frozen": 6},
        "optimizer": {**decay, "bias_correction": False},
    }
    with pytest.raises(RecipeError, match="needs 2 blocks at the top and 6 at the bottom, and the model has 7"):
        StableFinetuning(fresh_blocks=2, frozen=6).overrides("fresh+freeze", 0, PLAIN, 7)


def test_wrong_grids_are_named() -> None:
    with pytest.raises(RecipeError, match=r"'frese' is no stabiliser. Did you mean '(freeze|fresh)'"):
        StableFinetuning(stabilisers=("plain", "frese"))
    with pytest.raises(RecipeError, match=r"'plain\+decay' is no stabiliser"):
        StableFinetuning(stabilisers=("plain+decay",))
    for names in (("decay",), ("plain", "decay", "decay")):
        with pytest.raises(RecipeError, match="name each once, and plain"):
            StableFinetuning(stabilisers=names)


def made(scores: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch, metric: str = "accuracy") -> list[str]:
    """Trainings that give these scores; the names of those that ran."""
    ran: list[str] = []

    def train(self: engine.Bench, name: str, rows: Any = None, **overrides: Any) -> Trained:
        ran.append(name)
        stabiliser, _, seed = name.rpartition("-")
        figures: dict[str, Any] = {
            metric: Figure(scores[stabiliser][int(seed) - 5], 0.7, group="evaluation"),
            "optimizer state": Figure(80),
            "training time": Figure(1.5),
        }
        (self.folder / name / "model").mkdir(parents=True, exist_ok=True)
        return Trained(self.folder / name, self.folder / name / "model", Report(name, figures))

    monkeypatch.setattr(engine.Bench, "train", train)
    return ran


def test_failed_runs_spread_and_the_recommendation(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 6 of 9 evaluation rows are of the commonest class.
    scores = {
        "plain": [0.95, 2 / 3, 0.9],
        "freeze": [0.8, 0.75, 0.7],
        "decay": [0.85, 0.74, 0.67 + 1e-3],
        "fresh": [0.78, math.nan, 0.99],
    }
    made(scores, monkeypatch)
    asked = recipe()
    options = {"stabilisers": list(scores), "seeds": 3, "margin": 0.01}
    report = run_pipeline("stable-finetuning", asked, options, run)
    rows = {row[0]: row[1:] for row in report.tables[0].rows}
    assert rows["plain"][:5] == [
        pytest.approx(sum(scores["plain"]) / 3),
        pytest.approx(stdev(scores["plain"])),
        2 / 3,
        0.95,
        1,
    ]
    assert [rows[name][4] for name in scores] == [1, 0, 1, 1]
    assert rows["fresh"][0] == pytest.approx((0.78 + 0.99) / 2)
    assert report.figure("recommended").value == "freeze"
    assert report.figure("mean accuracy").before == pytest.approx(rows["plain"][0])
    assert report.figure("failed runs") == Figure(0, 1, "count", "lower", of=3)
    assert report.figure("constant answer").value == pytest.approx(2 / 3)
    assert [p.name for p in Path(asked.output).glob("*/model")] == ["model"]
    assert report.details["model"] == str(Path(asked.output) / "freeze-5" / "model")
    assert Path(report.details["model"]).exists()
    assert "few rows (24): fresh" in report.notes[0]
    assert reports.load(Path(asked.output) / "report.json").figure("recommended").value == "freeze"


def test_of_a_loss_lower_is_better(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made({"plain": [0.5, 0.695], "decay": [0.4, 0.5]}, monkeypatch, "loss")
    options = {"stabilisers": ["plain", "decay"], "seeds": 2, "metric": "loss", "keep": True}
    asked = recipe()
    report = run_pipeline("stable-finetuning", asked, options, run)
    rows = {row[0]: row[1:] for row in report.tables[0].rows}
    assert rows["plain"][2:5] == [0.695, 0.5, 1], "worst, best, failed: 0.7 was the loss before training"
    assert report.figure("recommended").value == "decay"
    assert report.details["model"].endswith("decay-5/model")
    assert len(list(Path(asked.output).glob("*/model"))) == 4


def test_what_is_taken_is_refused(recipe: Any) -> None:
    for fields, said in (
        ({"schedule": {"name": "lisa"}}, "names lisa; leave both out"),
        ({"optimizer": {"name": "galore"}}, "names galore; leave both out"),
        ({"method": "dylora"}, "leave out adapters"),
    ):
        with pytest.raises(RecipeError, match=said):
            run_pipeline("stable-finetuning", recipe(said[:9], **fields), {"seeds": 1}, run)


def test_the_whole_grid_runs(recipe: Any) -> None:
    options = {"stabilisers": [*KNOWN, "freeze+decay"], "seeds": 1, "longer": 1.5}
    asked = recipe(**{"train.learning_rate": 1e-3})
    report = run_pipeline("stable-finetuning", asked, options, run)
    rows = {row[0]: row[1:] for row in report.tables[0].rows}
    assert list(rows) == [*KNOWN, "freeze+decay"]
    trains = {name: row[5] for name, row in rows.items()}
    assert trains["freeze"] == trains["freeze+decay"] < trains["plain"] == trains["fresh"] == trains["longer"]
    state = {name: row[6] for name, row in rows.items()}
    assert state["freeze"] == state["freeze+decay"] < state["plain"] == state["decay"] == state["fresh"]
    assert state["plain"] - state["freeze"] >= 8 * (trains["plain"] - trains["freeze"])
    history = reports.load(Path(asked.output) / "longer-5" / "report.json").details["history"]
    assert max(row["step"] for row in history) == 3
