"""Gradient dropout: the law of what is kept, and whose gradients it touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.core.adapter import Adapter
from tunesmith.core.objective import ModelLoss
from tunesmith.errors import DataError
from tunesmith.objectives.gradient_dropout import GradientDropout, agreement
from tunesmith.objectives.sft import SFT


def masked(family: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny(family, initializer_range=0.2), tunesmith.adapter("mask-tuning", **options))
    for made in model.modules():
        if isinstance(made, Adapter):
            with torch.no_grad():
                made.scores.add_(8e-3 * torch.randn(made.scores.shape))
    return model.train()


def gradients(model: nn.Module, objective: Any, given: dict[str, Tensor], total: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = objective(model, given, total)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_agreement_is_the_papers_probability() -> None:
    a = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0, -2.0, 3.0])
    b = torch.tensor([2.0, -1.0, -3.0, 0.0, -1.0, 6.0, -1.0])
    torch.testing.assert_close(agreement(a, b), torch.tensor([1.0, 0.5, 0.25, 1.0, 1.0, 0.25, 0.75]))


def test_the_share_of_draws_that_keep_an_entry_is_its_probability() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(20), torch.randn(20)
    objective, kept = GradientDropout(lam=1.0), torch.zeros(20)
    for _ in range(10_000):
        kept += objective._keep(a, b)
    assert float((kept / 10_000 - agreement(a, b)).abs().max()) < 0.02


@pytest.mark.parametrize(("family", "plain"), [("llama", SFT()), ("bert", ModelLoss())])
def test_without_strength_the_gradients_are_the_tasks(family: str, plain: Any) -> None:
    model, given = masked(family), batch(family)
    ours, theirs = gradients(model, GradientDropout(lam=0.0, norm=0.0), given), gradients(model, plain, given)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-7, rtol=1e-4)


def test_with_strength_entries_are_the_tasks_or_nothing() -> None:
    model, given = masked(), batch("llama")
    ours, theirs = gradients(model, GradientDropout(norm=0.0), given), gradients(model, SFT(), given)
    dropped = 0
    for name, g in ours.items():
        stays = g != 0
        torch.testing.assert_close(g[stays], theirs[name][stays], atol=1e-7, rtol=1e-4)
        dropped += int((~stays & (theirs[name] != 0)).sum())
    assert dropped > 100


def test_a_model_at_its_original_keeps_everything() -> None:
    """b is zero where z is z0: there P is 1."""
    model = get_peft_model(tiny("llama"), tunesmith.adapter("mask-tuning")).train()
    _, scalars = GradientDropout()(model, batch("llama"))
    assert float(scalars["kept"]) > 0.45  # rounding decides the sign of a b of 1e-9
    ours = gradients(model, GradientDropout(lam=0.5, norm=0.0), batch("llama"))
    theirs = gradients(model, SFT(), batch("llama"))
    assert all(bool(((g == 0) | (g.abs() >= 0.49 * theirs[n].abs())).all()) for n, g in ours.items())


def test_the_loss_is_the_tasks_and_the_norm_pulls_on_scores_alone() -> None:
    model, given = masked(), batch("llama")
    loss, _ = GradientDropout(norm=10.0)(model, given)
    torch.testing.assert_close(loss, SFT()(model, given)[0])
    ours = gradients(model, GradientDropout(lam=0.0, norm=2.0), given)
    theirs = gradients(model, GradientDropout(lam=0.0, norm=0.0), given)
    for name, p in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name] - theirs[name], 2.0 * p / p.norm(), atol=1e-6, rtol=1e-3)


def test_what_else_trains_gets_its_whole_gradient() -> None:
    torch.manual_seed(0)
    config = tunesmith.adapter("mask-tuning", modules_to_save=["classifier"])
    model, given = get_peft_model(tiny("bert", initializer_range=0.2), config).train(), batch("bert")
    ours, theirs = gradients(model, GradientDropout(norm=0.0), given), gradients(model, ModelLoss(), given)
    heads = [name for name in ours if "classifier" in name]
    assert heads
    for name in heads:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-7, rtol=1e-4)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels of torch.float32"):
        GradientDropout().count({"labels": torch.zeros(3)})
