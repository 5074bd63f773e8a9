"""STAR: what a round sees, what it may not see, and what it asks of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from tests.contracts.test_recipes import recipe  # noqa: F401
from tests.train.conftest import data_file, model_folder  # noqa: F401
from tests.zoo import batch, tiny
from tunesmith.core.uncertainty import dropping_out, scores, under_dropout
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe
from tunesmith.recipes.star import blend, top, unit
from tunesmith.train import run


def chosen(folder: str) -> list[int]:
    import json

    return json.loads((Path(folder) / "stages" / "chosen-00.json").read_text())


@pytest.mark.slow
def test_rounds_grow_and_choose_new_rows(recipe: Callable[..., Recipe]) -> None:  # noqa: F811
    asked = recipe()
    found = run_pipeline("star", asked, {"rounds": 2, "start": 8, "per_round": 4, "passes": 2}, run)
    folder = Path(asked.output)
    first, second = (Dataset.load_from_disk(str(folder / f"rows-round-0{t}")) for t in range(2))
    assert (len(first), len(second)) == (8, 12)
    old, new = ({row["prompt"] for row in rows} for rows in (first, second))
    assert old < new or len(old) < 8
    assert found.details["rows"] == [8, 12]
    saved = (folder / "round-01" / "recipe.yaml").read_text()
    assert "factor-decay" in saved
    assert "rank: 64" in saved
    assert "dropout: 0.1" in saved


@pytest.mark.slow
def test_labels_of_unlabelled_rows_are_not_looked_at(recipe: Callable[..., Recipe], tmp_path: Path) -> None:  # noqa: F811
    """The choice is the same whatever answers the rows that are not labelled yet have."""
    import json

    rows = [json.loads(line) for line in Path(recipe().data.train or "").read_text().splitlines()]
    results = []
    for i, options in enumerate(({}, {}, {"use_gold": True})):
        asked = recipe(f"run-{i}", **{"data.eval_fraction": 0.1})
        if i:
            run_folder = Path(recipe("run-0").output)
            held = {row["prompt"] for row in Dataset.load_from_disk(str(run_folder / "rows-round-00"))}
            kept = {row["prompt"] for row in Dataset.load_from_disk(str(run_folder / "rows" / "eval"))}
            changed = [row if row["prompt"] in held | kept else {**row, "completion": "zzzz"} for row in rows]
            file = tmp_path / f"changed-{i}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in changed))
            asked = recipe(f"run-{i}", **{"data.train": str(file), "data.eval_fraction": 0.1})
        run_pipeline("star", asked, {"rounds": 2, "start": 8, "per_round": 4, "passes": 2, **options}, run)
        results.append(chosen(asked.output))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_more_rows_than_there_are_is_a_clear_error(recipe: Callable[..., Recipe]) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match=r"10 rounds from 500 rows by 500 need 5000 rows; the data has 36"):
        run_pipeline("star", recipe(), {}, run)


def test_mixture_and_order() -> None:
    base, now = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, 0.5])
    assert torch.allclose(blend(base, now, 2), 0.7 * base + 0.3 * now)
    assert torch.equal(blend(base, now, 30), now), "the weight stops at 1"
    assert top([4, 7, 9], torch.tensor([1.0, 3.0, 3.0]), 2) == [7, 9], "equal scores keep their order"
    assert unit(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_scores_are_the_formulas(family: str) -> None:
    model, given = tiny(family), batch(family, rows=3)
    if family in ("llama", "gpt2"):
        given["labels"][:, :4] = -100
        given["attention_mask"][1, 7:] = 0
        given["labels"][1, 7:] = -100
    logp = model(**{k: v for k, v in given.items() if k != "labels" or family == "t5"}).logits.log_softmax(-1).detach()
    labels = given["labels"]
    if family == "bert":
        expected = {"predictive": -logp.amax(-1), "entropy": -(logp.exp() * logp).sum(-1)}
    else:
        logp, labels = (logp, labels) if family == "t5" else (logp[:, :-1], labels[:, 1:])
        real = labels != -100
        own = -logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        expected = {"predictive": (own * real).sum(1), "entropy": (-(logp.exp() * logp).sum(-1) * real).sum(1)}
    for kind, wanted in expected.items():
        assert torch.allclose(scores(model, [given], kind).float(), wanted, rtol=1e-4)  # type: ignore[arg-type]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.out(self.drop(self.norm(x))))


def test_dropout_is_on_and_running_statistics_stay() -> None:
    model = Normed().eval()
    before = model.norm.running_mean.clone()
    given = [{"x": torch.randn(8, 4) + 3, "labels": torch.zeros(8, dtype=torch.long)}]
    passes = under_dropout(model, given, "entropy", 3, 0)
    assert passes.std(0).mean() > 0
    assert torch.equal(model.norm.running_mean, before)
    assert not model.training
    with dropping_out(model):
        assert model.drop.training
        assert not model.norm.training
