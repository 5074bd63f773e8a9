"""What is special to SSF."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.ssf import SSF
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe


def made_for(module: nn.Module, **options: Any) -> SSF:
    return SSF(describe(module, "layer"), **options)


def test_start_is_normal_around_the_identity() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = made_for(nn.Linear(2, 20000), std=0.5)
    assert made.shift is not None
    for tensor, mean in ((made.scale, 1.0), (made.shift, 0.0)):
        assert tensor.mean().item() == pytest.approx(mean, abs=4 * 0.5 / 20000**0.5)
        assert tensor.std().item() == pytest.approx(0.5, rel=0.03)


def test_default_targets_of_a_vit() -> None:
    model = tiny("vit")
    found = SSF.targets(model)
    assert len(found) == 1 + 2 * (2 + 6) + 1
    assert "vit.embeddings.patch_embeddings.projection" in found
    assert "vit.layernorm" in found
    assert "classifier" not in found


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_embedding_and_head_are_left_alone(family: str) -> None:
    model = tiny(family)
    chosen = {model.get_submodule(name) for name in SSF.targets(model)}
    assert not chosen & {model.get_input_embeddings(), model.get_output_embeddings()}


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (3, 6)),
        (LlamaRMSNorm(6), (2, 3, 6)),
        (GemmaRMSNorm(6), (2, 3, 6)),
        (nn.BatchNorm2d(6), (2, 6, 6, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 6, 6)),
        (nn.GroupNorm(3, 6), (2, 6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_channels_of_every_norm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """Also where the channels are not the last dimension, and where the stored factor is minus one."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn(p.shape, generator=g))
    made, x = made_for(norm.eval(), std=0.5), torch.randn(shape, generator=g)
    dim = 1 if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) else -1
    expected = norm(x).movedim(dim, -1) * made.scale
    expected = expected if made.shift is None else expected + made.shift
    assert torch.allclose(made(x, stacked(norm, made.layer, [])), expected.movedim(-1, dim), atol=1e-5)
    assert (made.shift is None) == isinstance(norm, LlamaRMSNorm | GemmaRMSNorm)


def test_conv1d_scales_outputs_not_inputs() -> None:
    layer = Conv1D(8, 8)
    made, x = made_for(layer), torch.randn(3, 8)
    with torch.no_grad():
        made.scale.copy_(torch.arange(8.0))
        made.shift.zero_()
        assert torch.allclose(made(x, stacked(layer, made.layer, [])), torch.arange(8.0) * layer(x), atol=1e-6)


def test_a_bias_that_is_there_is_scaled_without_a_shift_too() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(4, 5)
    made = made_for(layer, std=0.5, shift=False)
    below = stacked(layer, made.layer, [])
    expected = layer(x) * made.scale
    assert torch.allclose(made(x, below), expected, atol=1e-6)
    assert torch.allclose(below.apply(x, made.weight(below.weight), made.bias(below.bias)), expected, atol=1e-6)


@given(seed=st.integers(0, 99), std=st.floats(0.0, 2.0))
@settings(max_examples=20, deadline=None)
def test_two_are_one(seed: int, std: float) -> None:
    """gamma2 (gamma1 f + beta1) + beta2 is an SSF again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer, x = nn.Linear(5, 7), torch.randn(4, 5)
        first, second, one = (made_for(layer, std=std) for _ in range(3))
    with torch.no_grad():
        one.scale.copy_(second.scale * first.scale)
        one.shift.copy_(second.scale * first.shift + second.shift)
    both, single = stacked(layer, first.layer, [first, second]), stacked(layer, one.layer, [one])
    assert torch.allclose(both(x), single(x), atol=1e-4)
    assert torch.allclose(both.weight, single.weight, atol=1e-4)
    assert both.bias is not None
    assert single.bias is not None
    assert torch.allclose(both.bias, single.bias, atol=1e-4)


@pytest.mark.parametrize("shift", [True, False])
def test_biases_appear_only_with_a_shift(shift: bool) -> None:
    base, given_ = tiny("llama"), batch("llama")
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("ssf", std=0.1, shift=shift))
    expected = logits(model, given_)
    merged = model.merge_and_unload()
    new = set(merged.state_dict()) - set(base.state_dict())
    linears = [name for name in SSF.targets(base) if isinstance(base.get_submodule(name), nn.Linear)]
    assert new == ({f"{name}.bias" for name in linears} if shift else set())
    assert torch.allclose(logits(merged, given_), expected, atol=1e-4)


def test_shift_of_a_layer_behind_an_rmsnorm_spans_the_norms_own() -> None:
    norm, linear, x, shift = LlamaRMSNorm(6), nn.Linear(6, 4, bias=False), torch.randn(3, 6), torch.randn(6)
    made = made_for(linear, std=0.0)
    with torch.no_grad():
        made.shift.copy_(linear.weight @ shift)
        wanted = linear(norm(x) + shift)
        assert torch.allclose(made(norm(x), stacked(linear, made.layer, [])), wanted, atol=1e-5)
