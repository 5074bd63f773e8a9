"""LT-SFT: what is chosen, what changes and what does not, and that differences of one base add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contracts.test_recipes import recipe  # noqa: F401
from tests.train.conftest import data_file, model_folder, write_rows  # noqa: F401
from tests.zoo import checkpoint, same, tiny
from tunesmith.core.sparse import SparseDelta
from tunesmith.engine.pipeline import run_pipeline
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.models.loader import load_model
from tunesmith.recipe import Recipe
from tunesmith.recipes.lottery_sft import LotterySFT, _check, most_moved
from tunesmith.train import run

Make = Callable[..., Recipe]


def model_of(folder: str | Path) -> nn.Module:
    return load_model(str(folder)).model


def named(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def delta_of(asked: Recipe) -> SparseDelta:
    return SparseDelta.load(Path(asked.output) / "delta" / "delta.safetensors")


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, list[int]]:
    found = {n: (a[n] != b[n]).flatten().nonzero()[:, 0].tolist() for n in a}
    return {n: places for n, places in found.items() if places}


# Choosing -------------------------------------------------------------------------------------------------------------


def test_the_most_moved_are_the_top_k_of_all_tensors_and_ties_go_to_the_first() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(2, 2), "c": torch.zeros(3)}
    moved = {
        "a": torch.tensor([1.0, -5.0, 0.0, 2.0]),
        "b": torch.tensor([[2.0, -2.0], [4.0, 2.0]]),
        "c": torch.ones(3) * 9,
    }
    found = most_moved(base, moved, ["a", "b"], {}, 4)
    assert {n: places.tolist() for n, places in found.items()} == {"a": [1, 3], "b": [0, 2]}
    # The next two: none of the first again, nor of what is not maskable.
    more = most_moved(base, moved, ["a", "b"], found, 6)
    assert {n: places.tolist() for n, places in more.items()} == {"a": [1, 3], "b": [0, 1, 2, 3]}
    with pytest.raises(TunesmithError, match=r"8 more entries .* only 7 moved"):
        most_moved(base, moved, ["a", "b"], {}, 8)
    with pytest.raises(TunesmithError, match="'b' is not finite"):
        most_moved(base, {**moved, "b": moved["b"] / 0}, ["a", "b"], {}, 2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_maskable_is_all_but_norms_and_a_new_head_and_k_their_share(family: str) -> None:
    class Fake:
        def open(self, model: Path | None) -> Any:
            return SimpleNamespace(model=tiny(family))

    sizes = {n: p.numel() for n, p in tiny(family).named_parameters()}
    head = {n for n in sizes if n.startswith("classifier")}
    norms = {n for n in sizes if "norm" in n.lower()}
    assert norms
    for options, out in (({}, norms | head), ({"norms": True}, head)):
        plan = LotterySFT(density=0.1, **options)._plan(Fake(), None)  # type: ignore[arg-type]
        kept = {n: k for n, k in sizes.items() if n not in out}
        assert plan["maskable"] == list(kept)
        assert plan["head"] == sorted(head)
        assert plan["total"] == sum(kept.values())
        assert plan["K"] == int(0.1 * plan["total"])


# The pipeline ---------------------------------------------------------------------------------------------------------


def test_exactly_the_chosen_entries_differ_also_under_weight_decay(recipe: Make) -> None:  # noqa: F811
    asked = recipe(**{"train.weight_decay": 0.5, "train.steps": 4, "method": "full"})
    report = run_pipeline("lottery-sft", asked, {"count": 500, "full_steps": 2}, run)
    folder, delta = Path(asked.output), delta_of(asked)
    base, full, tuned = (named(model_of(f)) for f in (asked.model.name, folder / "full-1", folder / "sparse-1"))
    assert delta.count == 500
    norms = [n for n in base if "norm" in n]
    sizes = {n: (full[n] - base[n]).abs().flatten() for n in base if n not in norms}
    every = torch.cat([sizes[n] for n in sizes])
    assert (every > 0).sum() > 500
    threshold = every.sort(descending=True).values[499]
    for name in sizes:
        chosen = (sizes[name] >= threshold).nonzero()[:, 0].tolist()
        assert (delta[name].indices.tolist() if name in delta else []) == chosen, name
    changed = differing(base, tuned)
    for name, places in changed.items():
        assert set(places) <= set(delta[name].indices.tolist()), name
    assert sum(map(len, changed.values())) > 490  # of a few the gradient may be zero in the second phase
    model = delta.add_(model_of(asked.model.name))
    for name, p in model.named_parameters():
        assert torch.allclose(p, tuned[name], atol=1e-7), name
    assert delta.nbytes == 8 * 500
    assert report.figure("entries that train").value == 500
    assert report.figure("loss").value < report.figure("loss").before
    assert json.loads((folder / "full-1" / "report.json").read_text())
    assert {r[0] for r in report.tables[0].rows} >= {"loss"}
    assert report.tables[0].columns == ["figure", "at first", "full-1", "sparse-1"]


@pytest.mark.slow
def test_iterations_add_entries_and_go_on(recipe: Make) -> None:  # noqa: F811
    asked = recipe(method="full")
    run_pipeline("lottery-sft", asked, {"count": 301, "iterations": 2, "norms": True}, run)
    folder = Path(asked.output)
    masks = [SparseDelta.load(folder / f"mask-{i}" / "delta.safetensors") for i in (1, 2)]
    assert [mask.count for mask in masks] == [150, 301]
    assert masks[1].at(masks[0]).count == 150
    base, first, second, tuned = (
        named(model_of(f)) for f in (asked.model.name, folder / "sparse-1", folder / "full-2", folder / "sparse-2")
    )
    assert "model.norm.weight" in differing(first, second)
    assert differing(first, tuned)
    for name, places in differing(base, tuned).items():
        assert set(places) <= set(masks[1][name].indices.tolist())
    for name, places in differing(base, first).items():
        assert set(places) <= set(masks[0][name].indices.tolist())


@pytest.mark.slow
def test_a_task_on_a_language_is_relative_to_the_first_base(recipe: Make, tmp_path: Path) -> None:  # noqa: F811
    language = recipe("language", method="full")
    run_pipeline("lottery-sft", language, {"count": 4000, "l1": 0.1}, run)
    rows = write_rows(
        tmp_path / "t.jsonl", [{"prompt": f"{i} ", "completion": "yes" if i % 2 else "no"} for i in range(30)]
    )
    task = recipe("task", method="full", **{"data.train": str(rows)})
    run_pipeline("lottery-sft", task, {"count": 4000, "on": str(Path(language.output) / "delta")}, run)
    one, two = delta_of(language), delta_of(task)
    both = (one + two).add_(model_of(language.model.name))
    tuned = named(model_of(Path(task.output) / "sparse-1"))
    for name, p in both.named_parameters():
        assert torch.allclose(p, tuned[name], atol=1e-6), name
    start = named(model_of(Path(task.output) / "start"))
    assert set(differing(start, tuned)) <= set(two)
    assert differing(start, named(model_of(language.model.name)))
    alone = model_of(language.model.name)
    with two.applied(alone):
        assert not same(checkpoint(alone), checkpoint(both))
    assert 0 < two.overlap(one) < 1  # where both have an entry, the task's is what it added
    for stage in ("full-1", "sparse-1"):
        assert "l1: 0.1" in (Path(language.output) / stage / "recipe.yaml").read_text()


def test_a_classifiers_head_is_whole(recipe: Make, model_folder: Any, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "yn"[i % 2]} for i in range(24)]
    data = write_rows(tmp_path / "c.jsonl", rows)
    asked = recipe(method="full", model=str(model_folder("bert")), **{"data.train": str(data)})
    report = run_pipeline("lottery-sft", asked, {"count": 100}, run)
    delta, folder = delta_of(asked), Path(asked.output)
    assert set(delta.whole) == {"classifier.weight", "classifier.bias"}
    assert not [n for n in delta if n.startswith("classifier") or "LayerNorm" in n]
    full, sparse = (model_of(folder / n).classifier.weight for n in ("full-1", "sparse-1"))
    assert not torch.equal(full, sparse)
    assert torch.equal(delta.whole["classifier.weight"], sparse)
    assert delta.nbytes == 800 + 4 * sum(t.numel() for t in delta.whole.values())
    assert "accuracy" in report.figures
    assert "a head of" in report.title


@pytest.mark.parametrize(
    ("changes", "l1", "message"),
    [
        ({"adapters": [{"name": "dylora"}]}, 0.0, "weights of a plain model"),
        ({"prompts": [{"name": "dept"}]}, 0.0, "weights of a plain model"),
        ({"model": {"quantization": "nf4", "adapter": None}}, 0.0, "quantization is nf4"),
        ({"optimizer": {"name": "galore"}}, 0.1, "names galore; leave"),
    ],
)
def test_recipes_that_have_no_weights_to_choose_from(changes: dict[str, Any], l1: float, message: str) -> None:
    plain = {
        "model": {"quantization": "none", "adapter": None},
        "prompts": [],
        "adapters": [{"name": "lora"}],
        "optimizer": {"name": "adamw_torch"},
    }
    _check(plain, l1)
    with pytest.raises(RecipeError, match=message):
        _check({**plain, **changes}, l1)


def test_more_entries_than_there_are(recipe: Make) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match="10000000 entries of"):
        run_pipeline("lottery-sft", recipe(method="full"), {"count": 10_000_000}, run)
