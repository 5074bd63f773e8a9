"""Routed feed-forwards: token by token, their gradients, what they cost and keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core import meters, routed
from tunesmith.errors import ModelError

G, WIDTH, IN, OUT, N = 4, 3, 5, 6, 7


def numbers(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_(grad)


def probabilities(tokens: int = N, seed: int = 9) -> Tensor:
    return torch.sigmoid(numbers(tokens, G, seed=seed, grad=False)).requires_grad_()


@pytest.mark.parametrize("active", [1, 2, 4])
def test_token_by_token(active: int) -> None:
    """Each token through the rows, and then the columns, of its own blocks, by loops."""
    x, W1, b1, W2 = numbers(N, IN), numbers(G * WIDTH, IN, seed=1), numbers(G * WIDTH, seed=2), numbers(OUT, G * WIDTH)
    p = probabilities()
    way = routed.route(p, active)
    h = routed.into_blocks(x, W1, b1, way)
    y = routed.out_of_blocks(torch.relu(h), W2, way)
    plain = routed.into_blocks(x, W1, b1, way, weighted=False)
    for token in range(N):
        blocks = sorted(range(G), key=lambda g, token=token: -float(p.detach()[token, g]))[:active]
        assert way.chosen[token].tolist() == blocks
        total = torch.zeros(OUT, dtype=torch.float64)
        for slot, g in enumerate(blocks):
            rows = slice(g * WIDTH, (g + 1) * WIDTH)
            bare = W1[rows] @ x[token] + b1[rows]
            mine = 2 * p[token, g] * bare
            assert torch.allclose(h[token, slot * WIDTH : (slot + 1) * WIDTH], mine)
            assert torch.allclose(plain[token, slot * WIDTH : (slot + 1) * WIDTH], bare)
            total = total + 2 * p[token, g] * (W2[:, rows] @ torch.relu(mine))
        assert torch.allclose(y[token], total)


def test_gradients() -> None:
    """Of inputs, weights, biases and probabilities, against finite differences."""
    x, W1, b1, W2, p = numbers(N, IN), numbers(8, IN, seed=1), numbers(8, seed=2), numbers(OUT, 8), probabilities()

    def ffn(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, p: Tensor, A: Tensor) -> Tensor:
        way = routed.route(p, 2)
        h = torch.tanh(routed.into_blocks(x, W1, b1, way))
        low = routed.into_blocks(routed.project(x, A), W1[:, :2], None, way, weighted=False)
        return routed.out_of_blocks(h, W2, way) + routed.out_of_blocks(low, W2, way, weighted=False)

    assert torch.autograd.gradcheck(ffn, (x, W1, b1, W2, p, numbers(2, IN, seed=5)))


def test_a_block_without_tokens_and_no_tokens() -> None:
    p = torch.tensor([[0.9, 0.8, 0.1, 0.2]]).expand(N, G).clone().requires_grad_()
    way = routed.route(p, 2)
    assert way.counts == (N, N, 0, 0)
    h = routed.into_blocks(torch.randn(N, IN), torch.randn(8, IN), None, way)
    routed.out_of_blocks(h, torch.randn(OUT, 8), way).sum().backward()
    assert bool((p.grad[:, :2] != 0).all())
    assert not bool(p.grad[:, 2:].any())
    empty = routed.route(torch.zeros(0, G), 2)
    assert routed.into_blocks(torch.zeros(0, IN), torch.randn(8, IN), None, empty).shape == (0, 4)


def test_equal_probabilities_go_in_order() -> None:
    assert routed.route(torch.full((2, G), 0.5), 2).chosen.tolist() == [[0, 1], [0, 1]]


def test_flops_and_what_is_kept() -> None:
    """Half of the products; for the backward pass the inputs, once, and nothing of blocks."""
    x, W1, W2 = torch.randn(64, 16, requires_grad=True), torch.randn(32, 16), torch.randn(16, 32)
    way = routed.route(torch.sigmoid(torch.randn(64, G)).requires_grad_(), 2)

    def ffn() -> Tensor:
        return routed.out_of_blocks(routed.into_blocks(x, W1, None, way), W2, way)

    dense = meters.flops(lambda: F.linear(F.linear(x, W1), W2))
    assert meters.flops(ffn) == dense / 2
    assert meters.flops(lambda: ffn().sum().backward()) == dense  # and as much again for the inputs; none for weights
    owned = nn.ParameterList([nn.Parameter(t, False) for t in (W1, W2)])
    W1, W2 = owned[0], owned[1]
    with meters.saved_bytes(owned) as saved:
        ffn()
    order, weight, hidden = 64 * 2 * 8, 64 * 2 * 4, 64 * 16 * 4
    assert saved.bytes == x.nbytes + hidden + order + weight


def test_the_router_is_asked_once_for_a_tensor_and_forgets_it() -> None:
    made = routed.Router(IN, G, 2, even=False, device=torch.device("cpu"))
    x = torch.randn(2, 3, IN)
    way = made(x)
    assert made(x) is way
    assert made(x.clone()) is not way
    assert copy.deepcopy(made).run.way is None
    with pytest.raises(ModelError, match="given 5 tokens and the blocks of 6"):
        made.take(5)
    with pytest.raises(ModelError, match="the blocks of 0"):
        made.take(6)
    assert torch.allclose(way.weight, 2 * torch.sigmoid(x.flatten(0, 1) @ made.weight.T + made.bias).topk(2).values)


def test_low_precision_keeps_its_dtype() -> None:
    x, W = torch.randn(N, IN, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, IN, dtype=torch.bfloat16)
    A = torch.randn(2, IN, requires_grad=True)
    way = routed.route(torch.sigmoid(torch.randn(N, G)).requires_grad_(), 2)
    h = routed.into_blocks(x, W, None, way)
    assert h.dtype == torch.bfloat16
    z = routed.project(x, A)
    assert z.dtype == torch.float32
    (h.sum() + z.sum()).backward()
    assert x.grad.dtype == torch.bfloat16
    assert A.grad.dtype == torch.float32
