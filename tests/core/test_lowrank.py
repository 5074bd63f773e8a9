"""The product that low-rank adapters share: values, gradients of both orders, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.core.lowrank import low_rank
from tunesmith.core.meters import saved_bytes


def plain(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * (x @ A.T @ B.T)


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 6), (2, 6), (5, 2))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)  # type: ignore


def test_values_and_gradients_are_those_written_out(given: tuple[Tensor, ...]) -> None:
    assert torch.allclose(low_rank(*given, 0.7), plain(*given, 0.7))
    assert torch.autograd.gradcheck(lambda *t: low_rank(*t, 0.7), given)
    assert torch.autograd.gradgradcheck(lambda *t: low_rank(*t, 0.7), given)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 4, 6)])
def test_any_leading_shape(shape: tuple[int, ...], given: tuple[Tensor, ...]) -> None:
    _, A, B = given
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(f(x, A, B, 2.0).sin().sum(), (x, A, B)) for f in (low_rank, plain)]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_wants_are_not_made(needs: tuple[bool, ...], given: tuple[Tensor, ...]) -> None:
    inputs = [t.detach().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
    low_rank(*inputs, 1.0).sum().backward()
    assert [t.grad is not None for t in inputs] == list(needs)


def test_function_transforms(given: tuple[Tensor, ...]) -> None:
    x, A, B = (t.detach() for t in given)

    def loss(A: Tensor, row: Tensor) -> Tensor:
        return low_rank(row, A, B, 1.0).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(A, x)
    by_hand = torch.stack([torch.func.grad(lambda A, row=row: plain(row, A, B, 1.0).square().sum())(A) for row in x])
    assert torch.allclose(found, by_hand)


def test_autocast_lowers_the_product_and_not_the_gradients() -> None:
    x, A, B = torch.randn(4, 8), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = low_rank(x, A, B, 0.5)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    expected = torch.autograd.grad(plain(x, A, B, 0.5).square().sum(), (A, B))
    for found, exact in zip((A.grad, B.grad), expected, strict=True):
        assert torch.allclose(found, exact, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32).to(dtype)
    A, B = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.randn(16, 4))
    with saved_bytes() as kept:
        low_rank(x, A, B, 1.0)
    assert kept.bytes == x.numel() * x.element_size()
