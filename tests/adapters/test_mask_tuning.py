"""Mask tuning: what is masked, its straight-through gradient, its bits."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.mask_tuning import MaskTuning, masked_share, unpacked
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.meters import saved_bytes
from tunesmith.core.sparse_export import sparse_delta
from tunesmith.errors import ModelError, RecipeError


def masks(model: nn.Module) -> list[MaskTuning]:
    return [m for m in model.modules() if isinstance(m, MaskTuning)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5", "vit"])
def test_attention_alone_is_masked_and_nothing_is_at_the_start(family: str) -> None:
    base, given = tiny(family), batch(family)
    expected = logits(base, given)
    model = get_peft_model(base, tunesmith.adapter("mask-tuning"))
    assert torch.equal(logits(model, given), expected)
    names = [made.layer.name for made in masks(model)]
    assert names
    assert not any(word in name for name in names for word in ("mlp", "fc", "intermediate", "DenseReluDense"))
    assert masked_share(model) == 0


def test_the_gradient_goes_straight_through() -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 4).requires_grad_(False)
    made = MaskTuning(describe(module, "layer"))
    with torch.no_grad():
        made.scores.copy_(torch.where(torch.rand(4, 6) < 0.4, 4e-3, 1e-2))
    x = torch.randn(3, 6, requires_grad=True)
    y = stacked(module, made.layer, [made])(x)
    y.square().sum().backward()
    W = (module.weight * (made.scores > 5e-3)).detach().requires_grad_()
    again = x.detach().requires_grad_()
    expected = nn.functional.linear(again, W, module.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(made.scores.grad, W.grad * module.weight)
    torch.testing.assert_close(x.grad, again.grad)
    assert bool(made.scores.grad[made.scores < 5e-3].any()), "a masked weight still learns whether to come back"


def test_a_score_at_the_threshold_is_masked() -> None:
    made = MaskTuning(describe(nn.Linear(2, 1), "layer"), threshold=5e-3)
    with torch.no_grad():
        made.scores.copy_(torch.tensor([[5e-3, 5.1e-3]]))
    assert made.kept.tolist() == [[False, True]]


def test_adam_needs_start_minus_threshold_over_lr_steps() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 8).requires_grad_(False)
    made = MaskTuning(describe(module, "layer"))
    layer = stacked(module, made.layer, [made])
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    shares = []
    for _ in range(8):
        layer(torch.ones(1, 8)).sum().backward()  # a constant gradient: every step is lr
        optimizer.step()
        optimizer.zero_grad()
        shares.append(float((~made.kept).float().mean()))
    assert shares[:4] == [0.0] * 4
    assert shares[5] == float((module.weight > 0).float().mean())


def test_bits_hold_the_mask() -> None:
    made = MaskTuning(describe(nn.Linear(5, 3), "layer"))
    with torch.no_grad():
        made.scores.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert made.packed().numel() == 2
    assert torch.equal(unpacked(made.packed(), (3, 5)), made.kept)


def test_a_delta_takes_the_masked_weights_away() -> None:
    base = tiny("gpt2")
    model = get_peft_model(tiny("gpt2"), tunesmith.adapter("mask-tuning"))
    for made in masks(model):
        with torch.no_grad():
            made.scores.copy_(torch.randn(made.scores.shape, generator=torch.Generator().manual_seed(1)))
    delta = sparse_delta(model)
    with delta.applied(base):
        weight = base.get_parameter("transformer.h.0.attn.c_attn.weight")
        assert torch.equal((weight == 0).T, ~masks(model)[0].kept)
    assert delta.count == round(masked_share(model) * sum(m.scores.numel() for m in masks(model)))


def test_autograd_keeps_no_masked_weight() -> None:
    module = nn.Linear(64, 64).requires_grad_(False)
    made = MaskTuning(describe(module, "layer"))
    x = torch.randn(2, 64, requires_grad=True)
    with saved_bytes(module) as kept:
        stacked(module, made.layer, [made])(x)
    assert kept.bytes == x.numel() * 4


def test_what_cannot_be_is_a_clear_error() -> None:
    with pytest.raises(RecipeError, match=r"start=0\.001 must be above threshold=0\.005"):
        MaskTuning(describe(nn.Linear(2, 2), "layer"), start=1e-3)
    with pytest.raises(ModelError, match="give `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tunesmith.adapter("mask-tuning"))
    with pytest.raises(ModelError, match="no masks"):
        masked_share(nn.Linear(2, 2))
