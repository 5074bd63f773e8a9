"""Rank tables: reading and writing, sharing out, and what adapters make of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.core.ranks import RankTable, largest, proportional
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import RecipeError

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")


def table() -> RankTable:
    return RankTable(dict(zip(LAYERS, (3, 1, 0), strict=True)), {LAYERS[0]: 0.5}, "by hand")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table().save(tmp_path / "ranks.json")
    read = RankTable.load(tmp_path / "ranks.json")
    assert dict(read) == dict(table())
    assert (read.scores, read.source) == ({LAYERS[0]: 0.5}, "by hand")
    assert list(read) == list(LAYERS), "the order is that of the model"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a rank table"),
        ("[1]", "expected"),
        ('{"ranks": {}}', "at least one layer"),
        ('{"ranks": {"a": -1}}', "the rank of 'a' must be"),
        ('{"ranks": {"a": 1.5}}', "found 1.5"),
        ('{"ranks": {"a": true}}', "found True"),
    ],
)
def test_a_bad_table_is_a_clear_error(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text(content)
    with pytest.raises(RecipeError, match=says):
        RankTable.load(tmp_path / "ranks.json")


def test_a_missing_table_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tunesmith ranks"):
        RankTable.load(tmp_path / "none.json")


def test_rows_are_blocks_and_columns_kinds_of_layers() -> None:
    columns, rows = table().rows()
    assert columns == ["block", "q", "up"]
    assert rows == [["model.layers.0", "3", "1"], ["model.layers.1", "0", ""]]


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_largest_scores_are_counted(values: list[list[float]], data: st.DataObject) -> None:
    scores = {str(i): torch.tensor(row) for i, row in enumerate(values)}
    budget = data.draw(st.integers(1, sum(map(len, values))))
    counts = largest(scores, budget)
    assert sum(counts.values()) == budget
    taken = [v for name, row in scores.items() for v in sorted(row.tolist(), reverse=True)[: counts[name]]]
    left = [v for name, row in scores.items() for v in sorted(row.tolist(), reverse=True)[counts[name] :]]
    assert not left or min(taken) >= max(left)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 9)), min_size=1, max_size=6), st.integers(2, 30))
def test_proportional_ranks_stay_within_budget_and_order(layers: list[tuple[float, int]], mean: int) -> None:
    weights = {str(i): w for i, (w, _) in enumerate(layers)}
    costs = {str(i): c for i, (_, c) in enumerate(layers)}
    budget = mean * sum(costs.values())
    ranks = proportional(weights, costs, dict.fromkeys(weights, 1000), budget)
    assert sum(costs[n] * r for n, r in ranks.items()) <= budget
    assert all(ranks[a] >= ranks[b] for a in ranks for b in ranks if weights[a] > weights[b])
    # One layer more could only be paid for by going over the budget.
    nearest = min(costs.values())
    assert sum(costs[n] * r for n, r in ranks.items()) > budget - sum(costs.values()) - nearest


def test_a_budget_that_does_not_pay_is_refused() -> None:
    with pytest.raises(RecipeError, match="the budget is 3"):
        proportional({"a": 1.0}, {"a": 4}, {"a": 9}, 3)
    with pytest.raises(RecipeError, match="finite"):
        proportional({"a": float("nan")}, {"a": 1}, {"a": 9}, 9)


@pytest.mark.parametrize("slug", ["dylora", "lora"])
def test_an_adapter_takes_its_layers_and_ranks_from_a_table(slug: str, tmp_path: Path) -> None:
    base = tiny("llama")
    table().save(tmp_path / "ranks.json")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter(slug, ranks=tmp_path / "ranks.json"))
    shapes = {n.split(".default")[0]: p.shape[0] for n, p in model.named_parameters() if "A" in n and p.requires_grad}
    assert sorted(shapes.values()) == [1, 3]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))
    expected = logits(model, batch("llama"))
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    assert torch.equal(logits(loaded, batch("llama")), expected)


def test_a_table_of_another_model_and_of_too_few_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"the model has no layer 'model.layers.0.self_attn.q_proj'"):
        get_peft_model(tiny("gpt2"), tunesmith.adapter("dylora", ranks=table()))
    with pytest.raises(RecipeError, match=r"says nothing of 'model.layers.0.self_attn.k_proj'"):
        get_peft_model(tiny("llama"), tunesmith.adapter("dylora", ranks=table(), target_modules=["k_proj"]))
    with pytest.raises(RecipeError, match="ssf has no `rank`"):
        get_peft_model(tiny("llama"), tunesmith.adapter("ssf", ranks=table()))


def test_several_low_rank_parts_are_exported_as_one(tmp_path: Path) -> None:
    base = tiny("llama")
    both = tunesmith.stack(tunesmith.adapter("dylora", rank=2), tunesmith.adapter("dylora", ranks=table()))
    model = get_peft_model(copy.deepcopy(base), both)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    assert any(len(m.active()) == 2 for m in model.modules() if isinstance(m, TunesmithLayer))
    expected = logits(model, batch("llama"))
    tunesmith.export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits(loaded, batch("llama")), expected, atol=1e-5)
