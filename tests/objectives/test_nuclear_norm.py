"""Nuclear norm: its value and slope, one layer per step whatever the micro-batches, and which layers are drawn."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.adapters.sara import SaRA
from tunesmith.core.seeds import integer
from tunesmith.errors import ModelError, RecipeError
from tunesmith.objectives.nuclear_norm import NuclearNorm, nuclear_norm
from tunesmith.recipe import load

GIVEN = batch("llama")
WIDE = {"hidden_size": 96, "intermediate_size": 80}


def tuned(family: str = "llama", changes: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    return get_peft_model(tiny(family, **(changes or {})), tunesmith.adapter("sara", **{"density": 0.3, **options}))


def layers(model: nn.Module) -> list[SaRA]:
    return [m for m in model.modules() if isinstance(m, SaRA)]


def drawn(model: nn.Module, term: NuclearNorm, number: int) -> tuple[SaRA, Tensor]:
    """The layer that gets a gradient at a step, and the term's value."""
    model.zero_grad()
    with tunesmith.step(model, number, 1000):
        loss, _ = term(model, GIVEN)
        loss.backward()
    (found,) = [made for made in layers(model) if made.values.grad is not None]
    return found, loss.detach()


def test_value_and_slope_are_those_of_the_masked_weight() -> None:
    model = tuned()
    found, loss = drawn(model, NuclearNorm(), 0)
    W = model.get_base_model().get_submodule(found.layer.name).original_weight()
    masked = torch.where(W.abs() < found.threshold, W, 0.0).double()
    U, S, Vh = torch.linalg.svd(masked, full_matrices=False)
    assert S.min() > 1e-4, "of full rank"
    torch.testing.assert_close(loss.double(), S.sum(), atol=0, rtol=1e-5)
    expected = (U @ Vh).flatten()[found.indices.long()]
    torch.testing.assert_close(found.values.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_singular_values_of_zero_have_no_slope() -> None:
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(7, 1, generator=g), torch.randn(1, 5, generator=g)
    P = (u @ v).requires_grad_(True)
    nuclear_norm(P).backward()
    torch.testing.assert_close(P.grad, (u / u.norm()) @ (v / v.norm()), atol=1e-5, rtol=1e-5)
    zero = torch.zeros(4, 3, requires_grad=True)
    loss = nuclear_norm(zero)
    loss.backward()
    assert float(loss) == 0
    assert not zero.grad.any()


def test_one_layer_at_a_step_the_same_for_its_micro_batches_and_all_in_time() -> None:
    model, term = tuned(), NuclearNorm(seed=3)
    seen = Counter()
    for number in range(120):
        found, loss = drawn(model, term, number)
        assert found is layers(model)[integer(0, len(layers(model)) - 1, 3, "nuclear-norm", number)]
        seen[found.layer.name] += 1
        if number < 3:
            pieces = [{k: v[i : i + 1] for k, v in GIVEN.items()} for i in range(2)]
            total = term.count(GIVEN)
            with tunesmith.step(model, number, 1000):
                parts = [float(term(model, piece, total)[0].detach()) for piece in pieces]
            assert sum(parts) == pytest.approx(float(loss), rel=1e-6)
    assert len(seen) == len(layers(model)) == 14
    assert Counter(drawn(model, NuclearNorm(seed=4), n)[0].layer.name for n in range(5)) != Counter(
        drawn(model, term, n)[0].layer.name for n in range(5)
    )


def test_narrow_layers_are_drawn_only_where_there_is_no_other() -> None:
    model = tuned(changes=WIDE)
    sides = {min(drawn(model, NuclearNorm(), n)[0].layer.shape) for n in range(30)}
    assert sides == {80, 96}, "the keys and values are 48 wide"
    assert {min(drawn(model, NuclearNorm(min_side=80), n)[0].layer.shape) for n in range(20)} == {96}
    narrow = tuned()
    assert {min(drawn(narrow, NuclearNorm(), n)[0].layer.shape) for n in range(30)} == {16, 32}


def test_convolutions_count_where_asked() -> None:
    model = tuned("vit", target_modules=["projection"])
    with pytest.raises(ModelError, match=r"all 1 layers are convolutions.*set `convolutions`"):
        NuclearNorm()(model, GIVEN)
    (made,) = layers(model)
    loss, _ = NuclearNorm(convolutions=True)(model, GIVEN)
    norm = torch.linalg.matrix_norm(made.trained_matrix().detach().flatten(1), "nuc")
    torch.testing.assert_close(loss.detach(), norm)


def test_frozen_entries_do_not_count() -> None:
    model = tuned()
    found, _ = drawn(model, NuclearNorm(), 0)
    with torch.no_grad():
        found.values[::2] = 1.0
    found._freeze(found.values.detach().abs() >= found.threshold)
    again, loss = drawn(model, NuclearNorm(), 0)
    assert again is found
    assert not found.values.grad[::2].any()
    assert found.values.grad[1::2].all()
    left = torch.where(found.frozen, 0.0, found.values.detach())
    dense = torch.zeros(found.layer.shape).flatten().index_copy(0, found.indices.long(), left)
    torch.testing.assert_close(loss, torch.linalg.matrix_norm(dense.view(found.layer.shape), "nuc"))


def test_under_autocast_the_slope_is_not_rounded() -> None:
    model = tuned()
    found, _ = drawn(model, NuclearNorm(), 0)
    expected = found.values.grad.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn(model, NuclearNorm(), 0)
    assert torch.equal(found.values.grad, expected)


def test_alone_it_makes_the_trained_entries_of_lower_rank() -> None:
    model = tuned()
    made = layers(model)[0]
    start = torch.linalg.svdvals(made.trained_matrix().detach())
    optimizer = torch.optim.SGD([made.values], lr=5e-4)
    for _ in range(20):
        nuclear_norm(made.trained_matrix()).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = torch.linalg.svdvals(made.trained_matrix().detach())
    assert float(end.sum()) < 0.8 * float(start.sum())
    assert int((end > 0.3 * end[0]).sum()) < int((start > 0.3 * start[0]).sum())


def test_what_has_no_trained_matrix_is_refused() -> None:
    with pytest.raises(ModelError, match="add `sara` to the adapters"):
        NuclearNorm()(get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear")), GIVEN)
    assert NuclearNorm()(tiny("llama"), GIVEN)[0].item() == 0
    with pytest.raises(RecipeError, match="there is no adapter"):
        load({"method": "full", "regularisers": ["nuclear-norm"]}).check()


def test_idle_adapters_are_not_drawn() -> None:
    model = tuned()
    model.add_adapter("second", tunesmith.adapter("sara", density=0.3))
    model.set_adapter("second")
    assert {drawn(model, NuclearNorm(), n)[0].group for n in range(6)} == {"second"}
    assert copy.deepcopy(layers(model)[0]).at_step == 0
