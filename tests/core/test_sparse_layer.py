"""Layers with few trained entries: forward, gradients and what is kept, against the dense way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.core import layer as layers
from tunesmith.core.adapter import Adapter, Below, stacked
from tunesmith.core.meters import saved_bytes
from tunesmith.core.sparse_layer import SparseAdapter
from tunesmith.errors import ModelError


class Few(SparseAdapter):
    kinds = frozenset({"linear", "conv", "embedding", "norm"})


class Shift(Adapter):
    """Something else that trains, above or below."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.by = nn.Parameter(torch.full((), 0.3))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.by


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "two dimensions": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (lambda: Conv1D(4, 6), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "norm": (lambda: nn.LayerNorm(6), (3, 5, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}


def made(name: str, count: int = 5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Few, Below, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make().to(dtype).requires_grad_(False)
    spec = layers.describe(module, "layer")
    few = Few(spec, count)
    g = torch.Generator().manual_seed(1)
    places = torch.randperm(torch.Size(spec.shape).numel(), generator=g)[:count]
    few.place(places, torch.randn(count, generator=g))
    x = torch.randint(7, (3, 5), generator=g) if shape is None else torch.randn(shape, generator=g).to(dtype)
    return module, few, stacked(module, spec, [few]), x


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_dense_way(name: str) -> None:
    module, few, layer, x = made(name)
    if x.is_floating_point():
        x.requires_grad_(True)
    y = layer(x)
    y.square().sum().backward()
    W = layers.read_weight(module, few.layer).detach()
    dense = torch.zeros(W.numel()).index_add(0, few.indices.long(), few.values.detach()).view(W.shape)
    changed = (W + dense).requires_grad_(True)
    again = x.detach().clone()
    if x.is_floating_point():
        again.requires_grad_(True)
    expected = layers.apply(module, few.layer, again, changed, getattr(module, "bias", None))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    expected.square().sum().backward()
    assert changed.grad is not None
    torch.testing.assert_close(few.values.grad, changed.grad.flatten()[few.indices.long()], atol=1e-5, rtol=1e-5)
    if x.is_floating_point():
        torch.testing.assert_close(x.grad, again.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_bfloat16_keeps_float32_values(name: str) -> None:
    _, few, layer, x = made(name, dtype=torch.bfloat16)
    y = layer(x.requires_grad_(True))
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert few.values.dtype == few.values.grad.dtype == torch.float32


def test_autograd_keeps_the_input_the_values_and_nothing_dense() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 64).requires_grad_(False)
    few = Few(layers.describe(module, "layer"), 10)
    layer, x = stacked(module, few.layer, [few]), torch.randn(2, 64, requires_grad=True)
    with saved_bytes(module) as kept:
        layer(x)
    assert kept.bytes == x.numel() * 4 + 10 * 4  # the values are a parameter


def test_watch_sees_the_dense_gradient_of_the_layer() -> None:
    _, few, layer, x = made("conv1d")
    seen: list[Tensor] = []
    few.watch = lambda dW: seen.append(dW.clone())
    layer(x).sum().backward()
    (dW,) = seen
    assert tuple(dW.shape) == few.layer.shape
    torch.testing.assert_close(dW.flatten()[few.indices.long()], few.values.grad)


@pytest.mark.parametrize("below_first", [True, False])
def test_with_another_adapter_on_the_same_layer_both_get_their_gradients(below_first: bool) -> None:
    module, few, _, x = made("linear")
    shift = Shift(few.layer)
    stack = [shift, few] if below_first else [few, shift]
    stacked(module, few.layer, stack)(x).square().sum().backward()
    W = (module.weight + 0.3).detach()
    dense = torch.zeros(24).index_add(0, few.indices.long(), few.values.detach()).view(4, 6)
    changed = (W + dense).requires_grad_(True)
    nn.functional.linear(x, changed, module.bias).square().sum().backward()
    torch.testing.assert_close(few.values.grad, changed.grad.flatten()[few.indices.long()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shift.by.grad, changed.grad.sum(), atol=1e-4, rtol=1e-5)


def test_places_are_kept_ascending_with_their_values() -> None:
    _, few, _, _ = made("linear", count=3)
    order = few.place(torch.tensor([9, 2, 5]), torch.tensor([1.0, 2.0, 3.0]))
    assert few.indices.tolist() == [2, 5, 9]
    assert few.values.tolist() == [2.0, 3.0, 1.0]
    assert order.tolist() == [1, 2, 0]
    indices, values = few.sparse(torch.zeros(few.layer.shape))
    assert not values.requires_grad
    assert indices.dtype == torch.int32


@pytest.mark.parametrize("count", [0, 25])
def test_more_entries_than_there_are_is_a_clear_error(count: int) -> None:
    spec = layers.describe(nn.Linear(6, 4), "model.q_proj")
    with pytest.raises(ModelError, match=rf"'model.q_proj' has 24 entries, of which Few is to train {count}"):
        Few(spec, count)
