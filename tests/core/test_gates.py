"""Adapters turned down for a while, and the model without them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.core.gates import gated_layers, scaled
from tunesmith.core.reference import reference
from tunesmith.errors import ModelError


def moved(slug: str) -> tuple[nn.Module, nn.Module]:
    base = tiny("llama")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter(slug))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return base, model.eval()


@pytest.mark.parametrize("slug", ["dylora", "ssf", "lora"])
def test_a_factor_scales_the_change_and_is_taken_back(slug: str) -> None:
    base, model = moved(slug)
    given = batch("llama")
    names = gated_layers(model)
    before = logits(model, given)
    with scaled(model, dict.fromkeys(names, 0.0)):
        assert torch.allclose(logits(model, given), logits(base, given), atol=1e-5)
    assert torch.equal(logits(model, given), before)
    with scaled(model, {names[0]: 0.25}):
        assert not torch.allclose(logits(model, given), before)
        with scaled(model, {names[0]: 0.5}):
            pass
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize("slug", ["dylora", "lora"])
def test_half_of_a_linear_change_is_a_change_by_half_its_factor(slug: str) -> None:
    _, model = moved(slug)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in halved.named_parameters():
            if p.requires_grad and (".B" in name or "lora_B" in name):
                p.mul_(0.5)
    with scaled(model, dict.fromkeys(gated_layers(model), 0.5)):
        assert torch.allclose(logits(model, batch("llama")), logits(halved, batch("llama")), atol=1e-5)


def test_an_error_inside_takes_the_factor_back() -> None:
    _, model = moved("dylora")
    before = logits(model, batch("llama"))
    with pytest.raises(KeyError), scaled(model, {gated_layers(model)[0]: 0.0}):
        raise KeyError
    assert torch.equal(logits(model, batch("llama")), before)


def test_a_method_without_a_scale_is_named() -> None:
    model = get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="has no scale"):
        gated_layers(model)


@pytest.mark.parametrize("slug", ["dylora", "lora", "ssf"])
def test_the_reference_is_the_untouched_model(slug: str) -> None:
    base, model = moved(slug)
    model.train()
    with reference(model) as original:
        assert torch.equal(original(**batch("llama")).logits, logits(base, batch("llama")))
    assert model.training
    assert not torch.equal(logits(model, batch("llama")), logits(base, batch("llama")))


def test_no_reference_where_the_weights_changed() -> None:
    with pytest.raises(ModelError, match="Name an adapter"), reference(tiny("llama")):
        pass
    pissa = get_peft_model(tiny("llama"), peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="`pissa`"), reference(pissa):
        pass
