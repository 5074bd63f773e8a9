"""Mask sparsity: the L1 norm of structure masks, once per optimizer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.objective import ModelLoss
from tunesmith.errors import ModelError, RecipeError
from tunesmith.objectives.mask_sparsity import MaskSparsity
from tunesmith.recipe import load


def masked(family: str = "llama") -> nn.Module:
    return get_peft_model(tiny(family), tunesmith.adapter("structure-masks"))


def masks(model: nn.Module) -> list[StructureMasks]:
    return [m for m in model.modules() if isinstance(m, StructureMasks)]


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_it_is_the_sum_of_sizes_and_its_slope_the_signs(family: str) -> None:
    model, given = masked(family), batch(family)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for made in masks(model):
            made.factors.copy_(torch.randn(made.factors.shape, generator=g))
            made.factors[0] = 0
    loss, figures = MaskSparsity()(model, given)
    expected = sum(float(made.factors.abs().sum()) for made in masks(model))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert figures["mask_sum"].item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(torch.equal(made.factors.grad, made.factors.sign()) for made in masks(model))


def test_a_step_has_it_once_however_many_micro_batches() -> None:
    model, term, whole = masked(), MaskSparsity(), batch("llama", rows=4)
    whole["labels"][0, :5] = -100
    pieces = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    total = torch.stack([term.count(piece) for piece in pieces]).sum()
    parts = sum(term(model, piece, total)[0] for piece in pieces)
    assert parts.item() == pytest.approx(term(model, whole)[0].item(), rel=1e-6)


def test_factors_of_idle_adapters_do_not_count() -> None:
    model = masked()
    one = MaskSparsity()(model, batch("llama"))[0].item()
    model.add_adapter("second", tunesmith.adapter("structure-masks"))
    assert MaskSparsity()(model, batch("llama"))[0].item() == one


def test_it_drives_factors_of_dead_heads_down_and_nothing_else_does() -> None:
    base, given = tiny("bert", initializer_range=0.3), batch("bert", rows=8)
    name = "bert.encoder.layer.0.attention.output.dense"
    with torch.no_grad():
        base.get_submodule(name).weight[:, 8:16] = 0  # head 1
    ends: dict[float, Any] = {}
    for weight in (0.0, 1e-2):
        model = get_peft_model(base, tunesmith.adapter("structure-masks"), adapter_name=f"at{weight}".replace(".", "_"))
        made = next(m for m in masks(model) if m.layer.name == name and m.group == model.active_adapter)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(10):
            loss = ModelLoss()(model, given)[0] + weight * MaskSparsity()(model, given)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[weight] = made.factors.detach()[1].item()
        base = model.unload()
    assert ends[0.0] == 1.0
    assert ends[1e-2] == pytest.approx(0.95, abs=1e-6)


def test_without_masks_it_is_refused_where_there_are_adapters() -> None:
    given = batch("llama")
    with pytest.raises(ModelError, match="add `structure-masks` to the adapters"):
        MaskSparsity()(get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear")), given)
    assert MaskSparsity()(tiny("llama"), given)[0].item() == 0


def test_full_fine_tuning_is_refused() -> None:
    with pytest.raises(RecipeError, match="there is no adapter"):
        load({"method": "full", "regularisers": ["mask-sparsity"]}).check()
