"""What is special to CoLoRA."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.contracts.test_adapters import move
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.colora import CoLoRA, contributions, rank_table
from tunesmith.core.layer import describe
from tunesmith.core.lowrank import matrix_shape
from tunesmith.errors import ModelError, RecipeError


class Pictures(nn.Module):
    """Every kind of layer, a convolution last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.channels = nn.Linear(16, 16)
        self.mix = nn.Conv2d(16, 16, 1)
        self.tail = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.depthwise(self.head(x)).relu())
        return x + self.tail(self.mix(h * self.channels(h.mean((2, 3)))[..., None, None]))


def pictures(seed: int = 0) -> Pictures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Pictures()


def given(rows: int = 6, seed: int = 0) -> dict[str, Tensor]:
    x = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x**2}


def squares(model: nn.Module, row: Any) -> Tensor:
    return (model(row["x"]) - row["y"]).square().sum()


def adapted(base: nn.Module, **options: Any) -> nn.Module:
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", **options))
    tunesmith.initialise(model, [given()], loss=squares)
    return model


def held(model: nn.Module) -> dict[str, CoLoRA]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, CoLoRA)}


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def moved(base: nn.Module, size: float = 0.1) -> nn.Module:
    """As if tuned."""
    g, made = torch.Generator().manual_seed(3), copy.deepcopy(base)
    with torch.no_grad():
        for p in made.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return made


def test_contributions_are_mean_over_filters_of_sums_inside_them() -> None:
    base = pictures()
    tuned, batches, M = moved(base), [given(), given(4, seed=1)], 7
    totals = {name: torch.zeros_like(weight(base, name)) for name in CoLoRA.targets(base)}
    for m in range(M):
        here = copy.deepcopy(tuned)
        with torch.no_grad():
            for p, q in zip(here.parameters(), base.parameters(), strict=True):
                p += (m / M) * (q - p)
        for row in batches:
            squares(here, row).backward()
        for name, total in totals.items():
            total += weight(here, name).grad
    wanted = {}
    for name, total in totals.items():
        F = ((weight(base, name) - weight(tuned, name)) * total).abs()
        wanted[name] = float(torch.stack([each.detach().sum() for each in F]).mean())
    found = contributions(base, tuned.state_dict(), batches, squares, M)
    assert list(found) == ["head", "depthwise", "grouped", "channels", "mix", "tail"]
    assert sum(found.values()) == pytest.approx(1)
    for name, c in found.items():
        assert c == pytest.approx(wanted[name] / sum(wanted.values()), rel=1e-4), name


def test_filters_of_a_transposed_weight_are_its_output_features() -> None:
    base, rows = tiny("gpt2"), [batch("gpt2")]
    tuned = moved(base, 0.02)
    name = "transformer.h.0.mlp.c_fc"
    model = copy.deepcopy(base)
    model(**rows[0]).loss.backward()
    gradient = weight(model, name).grad
    adapter = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora"))
    tunesmith.initialise(adapter, rows)
    out_features = gradient.shape[1]  # stored as (in, out)
    assert held(adapter)[name]._score == pytest.approx(float(gradient.abs().sum()) / out_features, rel=1e-4)
    found = contributions(base, tuned.state_dict(), rows, points=1)
    model = copy.deepcopy(tuned)  # one point is the gradient at the tuned weights
    model(**rows[0]).loss.backward()
    scores = {}
    for each in found:
        F = ((weight(base, each) - weight(tuned, each)) * weight(model, each).grad).detach().abs()
        scores[each] = float(F.sum()) / F.shape[1]
    for each, c in found.items():
        assert c == pytest.approx(scores[each] / sum(scores.values()), rel=1e-3), each


def test_only_what_was_tuned_contributes_and_the_model_stays_as_it_was() -> None:
    base = pictures()
    before = {n: v.clone() for n, v in base.state_dict().items()}
    state = {"mix.weight": moved(base).state_dict()["mix.weight"]}
    found = contributions(base.train(), state, [given()], squares, points=5)
    assert found == {name: float(name == "mix") for name in CoLoRA.targets(base)}
    assert base.training
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in base.parameters())


def test_the_budget_is_met_and_ranks_follow_contributions() -> None:
    base = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(12)))
    scores = {str(i): float(c) for i, c in enumerate(torch.linspace(0, 1, 12).square())}
    table = rank_table(base, scores)
    ranks, allowed = list(table.values()), 0.07 * 12 * 9216
    assert allowed - 320 < sum(ranks) * 320 <= allowed
    assert ranks == sorted(ranks)
    assert ranks[0] == 1
    assert ranks[-1] > 4
    assert table.scores == scores
    # In proportion: twice the contribution is twice the rank.
    two = list(rank_table(nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400)), {"0": 0.6, "1": 0.3}).values())
    assert two[0] / two[1] == pytest.approx(2, rel=0.06)


def test_the_same_contribution_is_the_same_share_of_full_rank() -> None:
    base = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 200), nn.Conv2d(100, 100, 3))
    table = rank_table(base, {"0": 1.0, "1": 1.0, "2": 1.0}, budget=0.2)
    assert [table[n] / f for n, f in (("0", 400), ("1", 200), ("2", 100))] == pytest.approx([0.13] * 3, abs=0.02)


def test_equal_layers_share_what_rounding_leaves() -> None:
    base = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(8)))
    table = rank_table(base, {str(i): 1.0 for i in range(8)}, budget=0.06)
    assert sum(table.values()) == int(0.06 * 8 * 9216 / 320) == 13
    assert max(table.values()) - min(table.values()) == 1
    # 14 ranks: 2 and 1 cost 12, 3 and 1 cost 16; the two left go to layers that would be rounded up next.
    ranks = list(rank_table(base, {str(i): 1.0 if i < 4 else 0.5 for i in range(8)}, budget=0.0612).values())
    assert sorted(ranks[:4]) == [2, 2, 3, 3]
    assert ranks[4:] == [1, 1, 1, 1]


def test_beta_and_least() -> None:
    base = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
    scores = {"0": 8.0, "1": 4.0, "2": 1.0, "3": 0.0}
    assert len(set(rank_table(base, scores, beta=0).values())) == 1
    flat, steep = rank_table(base, scores, beta=0.5), rank_table(base, scores, beta=2)
    assert flat["0"] / flat["1"] == pytest.approx(2**0.5, rel=0.1)
    assert steep["0"] / steep["1"] == pytest.approx(4, rel=0.2)
    assert rank_table(base, scores, least=0)["3"] == 1
    # A share of 0.5 of the mean layer's 3.25: 1.625 against 8 and 4.
    table = rank_table(base, scores, budget=0.5, least=0.5)
    assert table["2"] == table["3"]
    assert table["0"] / table["3"] == pytest.approx(8 / 1.625, rel=0.1)


def test_no_layer_gets_more_than_full_rank() -> None:
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(64, 64))
    table = rank_table(base, {"0": 1.0, "1": 1.0, "2": 0.01}, budget=1.0)
    limits = {n: min(matrix_shape(describe(base.get_submodule(n), n))) for n in table}
    assert limits == {"0": 8, "1": 4, "2": 64}
    assert all(1 <= table[n] <= limits[n] for n in table)
    assert table["1"] == 4


def test_without_a_reference_ranks_follow_the_gradient() -> None:
    base, row = pictures(), given()
    model = adapted(base, budget=0.6)
    squares(base, row).backward()
    scores = {n: float(weight(base, n).grad.abs().sum() / len(weight(base, n))) for n in CoLoRA.targets(base)}
    wanted = dict(rank_table(base, scores, budget=0.6))
    assert {n: made.rank for n, made in held(model).items()} == wanted
    assert len(set(wanted.values())) > 2
    assert model.peft_config["default"].parts[0]["ranks"] == wanted
    spent = sum(made.trainable_count() for made in held(model).values())
    assert spent <= 0.6 * sum(weight(base, n).numel() for n in wanted)


def test_a_table_or_a_rank_needs_no_data() -> None:
    base = pictures()
    table = rank_table(base, contributions(base, moved(base).state_dict(), [given()], squares, 5), budget=0.6)
    for options in ({"ranks": table}, {"rank": 2}):
        model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", **options))
        assert tunesmith.initialise(model, [given()], loss=squares) == 0
        ranks = {n: made.rank for n, made in held(model).items()}
        assert ranks == (dict(table) if "ranks" in options else dict.fromkeys(table, 2))
        squares(model.train(), given()).backward()
    unprepared = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora"))
    with pytest.raises(ModelError, match="initialise"):
        unprepared.train()(given()["x"])


@torch.no_grad()
def test_saved_merged_and_grouped(tmp_path: Path) -> None:
    base, x = pictures(), given()["x"]
    with torch.enable_grad():
        model = adapted(base, budget=0.6, scale=0.5)
    assert torch.equal(model(x), base(x))
    move(model, 0.2)
    expected = model(x)
    assert (expected - base(x)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(x), expected, atol=1e-6)  # memory loaded from a file may be aligned otherwise
    for name, made in held(model).items():
        assert torch.equal(made.A, held(loaded)[name].A)
        assert torch.equal(made.B, held(loaded)[name].B)
    assert tunesmith.initialise(loaded, [given()], loss=squares) == 0
    for name, made in held(loaded).items():
        W = weight(base, name)
        B, A = made.to_lora()
        change = (0.5 * made.B @ made.A).view(W.shape)
        assert torch.allclose((B @ A).view(W.shape), change, atol=1e-6)
        assert made.A.shape[1] == math.prod(W.shape[1:]), "the inputs of one group"
    assert torch.allclose(loaded.merge_and_unload()(x), expected, atol=1e-5)


def test_equal_to_peft_where_peft_can() -> None:
    """LoRA on dense convolutions and linear layers with a table of ranks; PEFT's scale is alpha / r."""
    base, x = pictures(), given()["x"]
    table = {"head": 3, "mix": 2, "channels": 4}
    ours = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", ranks=table))
    config = LoraConfig(target_modules=list(table), rank_pattern=table, alpha_pattern=table)
    theirs = get_peft_model(copy.deepcopy(base), config)
    move(ours, 0.2)
    with torch.no_grad():
        for name, made in held(ours).items():
            layer = theirs.base_model.model.get_submodule(name)
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A.copy_(made.A.view_as(A))
            B.copy_(made.B.view_as(B))
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_targets(family: str) -> None:
    """Convolutions anywhere; the head of a classifier or language model is none of them."""
    base = tiny(family)
    found = CoLoRA.targets(base)
    assert ("vit.embeddings.patch_embeddings.projection" in found) == (family == "vit")
    assert not {"classifier", "lm_head"} & set(found)
    assert found == [n for n, _ in base.named_modules() if n in found]
    classifier = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert CoLoRA.targets(classifier) == ["0", "2"]
    generator = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 1, 3))
    assert CoLoRA.targets(generator) == ["0", "1", "3"]


def test_a_language_model(tmp_path: Path) -> None:
    base, row = tiny("llama"), batch("llama")
    table = rank_table(base, contributions(base, moved(base, 0.02).state_dict(), [row], points=5), budget=0.3)
    table.save(tmp_path / "ranks.json")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", ranks=tmp_path / "ranks.json"))
    assert len(held(model)) == 14
    expected = logits(move(model), row)
    assert torch.allclose(logits(model.merge_and_unload(), row), expected, atol=1e-4)


def test_errors() -> None:
    base = pictures()
    state = moved(base).state_dict()
    with pytest.raises(ModelError, match=r"names 'nowhere\.weight', which Pictures has not"):
        contributions(base, {"nowhere.weight": torch.zeros(2)}, [given()], squares)
    with pytest.raises(ModelError, match=r"'mix.weight' is \(2,\); the model's is \(16, 16, 1, 1\)"):
        contributions(base, {"mix.weight": torch.zeros(2)}, [given()], squares)
    with pytest.raises(ModelError, match=r"sum to 0\.0: is tuned_state the tuned model"):
        contributions(base, base.state_dict(), [given()], squares, 2)
    with pytest.raises(ModelError, match="sum to nan"):
        contributions(base, {"mix.weight": state["mix.weight"] * float("nan")}, [given()], squares, 2)
    with pytest.raises(RecipeError, match="rank 1 in every layer costs 295 parameters; the budget is 1"):
        rank_table(base, dict.fromkeys(CoLoRA.targets(base), 1.0), budget=0.001)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(RecipeError, match="finite, not negative and not all zero"):
            rank_table(base, {"mix": bad})
    with pytest.raises(ModelError, match="'0' is a norm layer; CoLoRA changes"):
        rank_table(nn.Sequential(nn.LayerNorm(4)), {"0": 1.0})
    with pytest.raises(RecipeError, match="budget"):
        tunesmith.adapter("colora", budget=0)
    for wrong, match in ((0.0, "gradient of every layer is zero"), (float("nan"), "gradient of 'head' is not finite")):
        model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora"))
        with pytest.raises(ModelError, match=match):
            tunesmith.initialise(model, [given()], loss=lambda m, row, wrong=wrong: wrong * squares(m, row))
