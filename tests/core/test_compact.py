"""Operations that keep less for their backward pass, one by one and in whole models."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from tests.zoo import FAMILIES, batch, tiny
from tunesmith.core import compact
from tunesmith.core.compact import Fixed, prune, restore
from tunesmith.core.compact_mode import GELU, OPERAND, PROBABILITY, Settings
from tunesmith.core.compact_model import Compaction
from tunesmith.core.meters import saved_bytes

ROWS = Settings(operand=Fixed(8, 3, rows=True), probability=Fixed(8, 0, signed=False, rows=True))


def random(*shape: int, seed: int = 0, grad: bool = True, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return (scale * torch.randn(shape, generator=g)).requires_grad_(grad)


def quantised(x: Tensor, integer: int, fraction: int) -> Tensor:
    """The formula, number by number."""
    low, high = -(2 ** (integer + fraction)), 2 ** (integer + fraction) - 1
    codes = [max(low, min(high, round(float(v) * 2**fraction))) for v in x.detach().flatten()]
    return torch.tensor(codes).view(x.shape) / 2.0**fraction


def kept(form: Fixed, x: Tensor) -> Tensor:
    return form.decode(form.encode(x), x.shape, x.dtype)


# Formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "integer", "fraction"), [(GELU, 2, 1), (OPERAND, 3, 4), (Fixed(4, 3), 3, 0)])
@pytest.mark.parametrize("shape", [(3, 7), (4, 6), (1,)])
def test_fixed_point_is_the_formula(form: Fixed, integer: int, fraction: int, shape: tuple[int, ...]) -> None:
    x = random(*shape, scale=4)
    assert torch.equal(kept(form, x), quantised(x, integer, fraction))
    assert form.encode(x).nbytes == math.ceil(x.numel() * form.bits / 8)
    half = x.to(torch.bfloat16)
    assert torch.equal(kept(form, half).float(), quantised(half, integer, fraction))


def test_ranges() -> None:
    ends = torch.tensor([-1e9, 1e9, -math.inf, math.inf])
    assert kept(GELU, ends).tolist() == [-4, 3.5, -4, 3.5]
    assert kept(OPERAND, ends).tolist() == [-8, 7.9375, -8, 7.9375]
    p = torch.tensor([0.0, 0.0019, 0.002, 0.5, 1.0])
    assert (kept(PROBABILITY, p) * 256).tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("form", [Fixed(4, 3, rows=True), ROWS.operand, ROWS.probability])
def test_an_exponent_per_row_clamps_nothing_and_loses_little(form: Fixed) -> None:
    x = random(3, 5, 7).detach() * torch.tensor([1e-6, 1.0, 300.0])[:, None, None]
    x = x if form.signed else x.abs()
    x[0, 0] = 0
    assert form.encode(x).nbytes == math.ceil(x.numel() * form.bits / 8) + 15
    largest = x.abs().amax(-1, keepdim=True)
    assert bool(((kept(form, x) - x).abs() <= largest / form.high * 1.01).all())
    assert not kept(form, x)[0, 0].any()


def test_pruning_keeps_the_largest() -> None:
    x = random(5, 9).detach()
    values, places = prune(x, 0.1)
    assert (len(values), places.dtype) == (4, torch.int32)
    expected = torch.where(x.abs() >= x.abs().flatten().sort(descending=True).values[3], x, 0.0)
    assert torch.equal(restore(values, places, x.shape), expected)
    assert len(prune(x[0], 0.01)[0]) == 1


# Operations: forward bit for bit, gradients by hand from the compressed values, bytes --------------------------------


class Inside(nn.Module):
    """A model of one block around a function."""

    def __init__(self, run: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(run, parts)])

    def forward(self, *given: Tensor) -> Tensor:
        return self.layers[0](*given)


class _Block(nn.Module):
    def __init__(self, run: Callable[..., Tensor], parts: Any) -> None:
        super().__init__()
        self.run, self.parts, self.marker = run, nn.ModuleList(parts), nn.Parameter(torch.zeros(1))

    def forward(self, *given: Tensor) -> Tensor:
        return self.run(*self.parts, *given)


def compare(
    run: Callable[..., Tensor], given: list[Tensor], *parts: nn.Module, settings: Settings | None = None
) -> tuple[Tensor, list[Tensor | None], int]:
    """The gradient that arrived, those of inputs and parts' parameters, and the bytes kept beside parameters."""
    model = Inside(run, *parts)
    plain = model(*given)
    compaction = Compaction(model, settings)
    with saved_bytes(model) as saved:
        out = model(*given)
    assert torch.equal(out, plain)
    compaction.remove()
    g = random(*out.shape, seed=9, grad=False)
    wanted = [t for t in (*given, *(p for part in parts for p in part.parameters())) if t.requires_grad]
    return g, list(torch.autograd.grad(out, wanted, g, allow_unused=True)), saved.bytes


def close(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_linear_layer_that_trains() -> None:
    x, layer = random(2, 3, 6, scale=5), nn.Linear(6, 4)
    g, (to_x, to_w, to_b), size = compare(lambda m, x: m(x), [x], layer)
    q = quantised(x, 3, 4)
    assert close(to_x, g @ layer.weight)
    assert close(to_w, g.flatten(0, 1).T @ q.flatten(0, 1))
    assert not close(to_w, g.flatten(0, 1).T @ x.flatten(0, 1))
    assert close(to_b, g.sum((0, 1)))
    assert size == x.numel()


def test_gpt2s_layer_that_trains() -> None:
    x, layer = random(2, 3, 6, scale=5), Conv1D(4, 6)
    g, (to_x, to_w, to_b), size = compare(lambda m, x: m(x), [x], layer)
    assert close(to_x, g @ layer.weight.T)
    assert close(to_w, quantised(x, 3, 4).flatten(0, 1).T @ g.flatten(0, 1))
    assert close(to_b, g.sum((0, 1)))
    assert size == x.numel()


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)])
def test_a_linear_layer_that_rests_keeps_nothing_but_its_weight(make: Callable[[], nn.Module]) -> None:
    x, layer = random(2, 3, 6), make()
    layer.weight.requires_grad_(False)
    g, (to_x, to_b), size = compare(lambda m, x: m(x), [x], layer)
    assert close(to_x, g @ (layer.weight.T if isinstance(layer, Conv1D) else layer.weight))
    assert close(to_b, g.sum((0, 1)))
    assert size == 0


def test_layers_with_one_input_keep_it_once_unless_it_changes() -> None:
    x, layers = random(2, 3, 6), [nn.Linear(6, 4) for _ in range(3)]

    def changed(a: nn.Module, b: nn.Module, c: nn.Module, x: Tensor) -> Tensor:
        h = x * 1.0
        first = a(h)
        h += 1
        return first + b(h) + c(h)

    assert compare(lambda a, b, c, x: a(x) + b(x) + c(x), [x], *layers)[2] == 36
    g, found, size = compare(changed, [x], *layers)
    assert size == 72
    assert close(found[1], g.flatten(0, 1).T @ quantised(x, 3, 4).flatten(0, 1))
    assert close(found[3], g.flatten(0, 1).T @ quantised(x + 1, 3, 4).flatten(0, 1))


def test_wide_layers_alone() -> None:
    settings = Settings(linear="wide")
    for layer, size in ((nn.Linear(8, 2), 32), (nn.Linear(2, 8), 32), (nn.Linear(4, 4), 64)):
        x = random(4, layer.in_features)
        g, (_, to_w, _), found = compare(lambda m, x: m(x), [x], layer, settings=settings)
        assert found == size
        assert close(to_w, g.T @ (quantised(x, 3, 4) if layer.in_features > layer.out_features else x))


def test_factors_of_attention() -> None:
    a, b = random(2, 3, 4, 5, scale=4), random(2, 3, 5, 6, scale=4, seed=1)
    for run in (torch.matmul, lambda a, b: a @ b, lambda a, b: torch.matmul(a, other=b)):
        g, (to_a, to_b), size = compare(run, [a, b])
        assert close(to_a, g @ quantised(b, 3, 4).transpose(-1, -2))
        assert close(to_b, quantised(a, 3, 4).transpose(-1, -2) @ g)
        assert size == a.numel() + b.numel()
    _, (to_a,), size = compare(torch.matmul, [a, b.detach()])
    assert size == b.numel(), "only what the other's gradient needs"
    g, (_, to_b), _ = compare(torch.matmul, [a, random(1, 1, 5, 6, seed=2)])
    assert close(to_b, (quantised(a, 3, 4).transpose(-1, -2) @ g).sum((0, 1), keepdim=True))


PRODUCTS = [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 2, 3, 4), (4, 5))]


@pytest.mark.parametrize("shapes", PRODUCTS)
def test_products_with_weights_are_exact(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = random(*shapes[0]), random(*shapes[1], seed=1)
    g, found, _ = compare(torch.matmul, [a, b])
    assert all(torch.equal(x, y) for x, y in zip(found, torch.autograd.grad(a @ b, [a, b], g), strict=True))


def test_probabilities_are_kept_once_with_eight_bits() -> None:
    scores, v = random(2, 3, 4, 40), random(2, 3, 40, 5, seed=1)

    def attend(scores: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)

    g, (to_scores, to_v), size = compare(attend, [scores, v])
    p = (F.softmax(scores, -1).detach() * 256).round().clamp(max=255) / 256
    to_p = g @ quantised(v, 3, 4).transpose(-1, -2)
    assert close(to_scores, p * (to_p - (to_p * p).sum(-1, keepdim=True)))
    assert close(to_v, p.transpose(-1, -2) @ g)
    assert size == scores.numel() + v.numel()


def test_probabilities_that_the_released_format_loses() -> None:
    """With 4 bits behind the point all of a uniform row over 40 tokens is 0, and the values learn nothing."""
    scores, v = torch.zeros(1, 1, 4, 40, requires_grad=True), random(1, 1, 40, 5, seed=1)
    g, (_, to_v), _ = compare(lambda s, v: s.softmax(-1) @ v, [scores, v])
    exact = g.sum(-2, keepdim=True).expand(1, 1, 40, 5) / 40
    assert not quantised(scores.softmax(-1), 3, 4).any()
    assert torch.allclose(to_v, exact, rtol=0.1)
    scores, v = torch.zeros(1, 1, 4, 600, requires_grad=True), random(1, 1, 600, 5, seed=1)
    g, (_, to_v), _ = compare(lambda s, v: s.softmax(-1) @ v, [scores, v])
    assert not to_v.any(), "1 / 600 rounds to 0 of 256"
    g, (_, to_v), _ = compare(lambda s, v: s.softmax(-1) @ v, [scores, v], settings=ROWS)
    assert torch.allclose(to_v, g.sum(-2, keepdim=True).expand_as(to_v) / 600, rtol=0.01)


def test_probabilities_after_dropout() -> None:
    scores, v = random(2, 3, 8, 8), random(2, 3, 8, 5, seed=1)

    def attend(scores: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.matmul(F.dropout(F.softmax(scores, dim=-1), 0.5, True), v)

    g, (_, to_v), _ = compare(attend, [scores, v])
    torch.manual_seed(3)
    p = F.dropout(F.softmax(scores, -1), 0.5, True).detach()
    q = (p / 2 * 256).round().clamp(max=255) / 256 * 2
    assert close(to_v, q.transpose(-1, -2) @ g)


def test_gelu_is_differentiated_at_the_kept_value() -> None:
    x = random(3, 5, scale=3)
    g, (to_x,), size = compare(F.gelu, [x])
    q = quantised(x, 2, 1)
    density = torch.exp(-q * q / 2) / math.sqrt(2 * math.pi)
    assert close(to_x, g * ((1 + torch.erf(q / math.sqrt(2))) / 2 + q * density))
    assert size == 8, "15 numbers of 4 bits"


SMOOTH = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "gelu_accurate", "gelu_python", "silu")


@pytest.mark.parametrize("name", SMOOTH)
def test_every_smooth_activation(name: str) -> None:
    x, module = random(2, 3, 8, scale=3), ACT2FN[name]
    g, (to_x,), size = compare(lambda m, x: m(x), [x], module)
    q = quantised(x, 2, 1).requires_grad_()
    assert close(to_x, torch.autograd.grad(module(q), q, g)[0])
    assert size == 24


@pytest.mark.parametrize("run", [F.relu, torch.relu, Tensor.relu, nn.ReLU()])
def test_relu_is_exact_with_a_bit(run: Callable[[Tensor], Tensor]) -> None:
    x = random(3, 7)
    with torch.no_grad():
        x[0, 0] = 0
    g, (to_x,), size = compare(run, [x])
    assert torch.equal(to_x, g * (x > 0))
    assert size == 3


def test_a_gated_mlp() -> None:
    x, y = random(2, 3, 8, scale=2), random(2, 3, 8, seed=1, scale=2)
    g, (to_x, to_y), size = compare(lambda x, y: F.silu(x) * y, [x, y])
    q = quantised(x, 2, 1).requires_grad_()
    assert close(to_y, g * quantised(F.silu(x), 3, 4))
    assert close(to_x, torch.autograd.grad(F.silu(q), q, g * quantised(y, 3, 4))[0])
    assert size == 24 + 48 + 48
    assert compare(lambda x, y: x * y, [x, y])[2] == 384, "another product is left alone"


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_a_layer_norm_that_rests(eps: float) -> None:
    """The layer's own epsilon counts: with another the gradient of small inputs is far off."""
    x, layer = random(2, 3, 20, scale=0.05), nn.LayerNorm(20, eps=eps)
    nn.init.normal_(layer.weight)
    layer.weight.requires_grad_(False)
    g, (to_x, to_b), size = compare(lambda m, x: m(x), [x], layer)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt().detach()
    n = (x - x.mean(-1, keepdim=True)).detach() / deviation
    n = torch.where(n.abs() >= n.abs().flatten().sort(descending=True).values[11], n, 0.0)
    h = g * layer.weight
    assert close(to_x, (h - h.mean(-1, keepdim=True) - n * (n * h).mean(-1, keepdim=True)) / deviation)
    assert close(to_b, g.sum((0, 1)))
    assert size == 12 * (4 + 4) + 6 * 4


def _norm(kind: str) -> nn.Module:
    made = {"layer": nn.LayerNorm, "llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "torch": nn.RMSNorm}[kind](20)
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(5))
    return made


@pytest.mark.parametrize("kind", ["layer", "llama", "gemma", "torch"])
def test_norms_that_keep_everything_are_exact(kind: str) -> None:
    x, layer = random(2, 3, 20), _norm(kind)
    layer.weight.requires_grad_(False)
    g, (to_x, *_), _ = compare(lambda m, x: m(x), [x], layer, settings=Settings(kept=1.0))
    assert close(to_x, torch.autograd.grad(layer(x), x, g)[0])
    _, (pruned, *_), size = compare(lambda m, x: m(x), [x], layer)
    assert not close(pruned, to_x)
    assert size == 12 * (4 + 4) + 6 * 4


@pytest.mark.parametrize("kind", ["layer", "llama", "gemma", "torch"])
def test_norms_that_train_are_left_alone(kind: str) -> None:
    x, layer = random(2, 3, 20), _norm(kind)
    g, found, _ = compare(lambda m, x: m(x), [x], layer)
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], g)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(8, 8, dtype=torch.bool).tril()},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_fused_attention_is_computed_again(case: str) -> None:
    heads = 2 if case == "grouped" else 4
    q, k, v = random(2, 4, 8, 16), random(2, heads, 8, 16, seed=1), random(2, heads, 8, 16, seed=2)
    given = [q, k, v]
    options = OPTIONS[case]
    if case == "bias":
        given.append(random(1, 4, 8, 8, seed=3))

    def run(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        torch.manual_seed(7)
        return F.scaled_dot_product_attention(q, k, v, *bias, **options)

    state = torch.get_rng_state()
    g, found, size = compare(run, given)
    form = Fixed(8, 3, rows=True)
    near = [kept(form, t).requires_grad_() for t in given[:3]] + [t.detach().requires_grad_() for t in given[3:]]
    for a, b in zip(found, torch.autograd.grad(run(*near), near, g), strict=True):
        assert close(a, b)
    torch.set_rng_state(state)
    extra = {"mask": 64, "bias": 4 * 256, "dropout": len(torch.get_rng_state())}.get(case, 0)
    assert size == sum(t.numel() + t.numel() // 16 for t in given[:3]) + extra


def test_dropout_in_the_backward_pass_leaves_the_random_state_alone() -> None:
    q = random(1, 2, 8, 16)
    model = Inside(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3))
    compaction = Compaction(model)
    out = model(q)
    torch.rand(3)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    compaction.remove()


def test_four_bits_for_all() -> None:
    settings = Settings(operand=Fixed(4, 3), probability=Fixed(4, 0, signed=False))
    x, layer = random(2, 3, 6, scale=5), nn.Linear(6, 4)
    g, (_, to_w, _), size = compare(lambda m, x: m(x), [x], layer, settings=settings)
    assert close(to_w, g.flatten(0, 1).T @ quantised(x, 3, 0).flatten(0, 1))
    assert size == 18


# Whole models -------------------------------------------------------------------------------------------------------

GRADS = dict[str, Tensor]
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1},
    "t5": {"dropout_rate": 0.1},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}


def model_of(family: str, attention: str = "sdpa") -> Any:
    model = tiny(family, **DROPOUT.get(family, {"attention_dropout": 0.1})).train()
    model.set_attn_implementation(attention)
    return model


def passes(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, GRADS, int]:
    """Logits, gradients and saved bytes, with the same dropout in each call."""
    model.zero_grad()
    torch.manual_seed(3)
    with saved_bytes(model) as saved:
        out = model(**given)
    out.loss.backward()
    return (
        out.logits.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        saved.bytes,
    )


def alike(a: GRADS, b: GRADS) -> float:
    """The cosine of all gradients together."""
    assert a.keys() == b.keys()
    one, other = (torch.cat([found[n].flatten().float() for n in a]) for found in (a, b))
    return float(F.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_less_and_computes_the_same(family: str, attention: str) -> None:
    model, given = model_of(family, attention), batch(family)
    classes = [type(m) for m in model.modules()]
    logits, grads, size = passes(model, given)
    compaction = Compaction(model, ROWS)
    found = passes(model, given)
    assert torch.equal(found[0], logits)
    assert found[2] < 0.7 * size
    assert 0.99 < alike(found[1], grads) < 1 - 1e-7
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits, model_of(family, attention).eval()(**given).logits)
    compaction.remove()
    assert [type(m) for m in model.modules()] == classes
    assert not any("forward" in vars(m) for m in model.modules())
    again = passes(model.train(), given)
    assert torch.equal(again[0], logits)
    assert all(torch.equal(again[1][n], g) for n, g in grads.items())
    assert again[2] == size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_under_autocast(family: str) -> None:
    model, given = model_of(family), batch(family)
    with torch.autocast("cpu", torch.bfloat16):
        plain = passes(model, given)
    compaction = Compaction(model, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = passes(model, given)
    compaction.remove()
    assert torch.equal(mixed[0], plain[0])
    assert alike(mixed[1], plain[1]) > 0.99
    assert mixed[2] < 0.5 * plain[2], "weights are not kept in a second type"


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
def test_a_model_in_half_precision(family: str) -> None:
    model = tiny(family).to(torch.bfloat16).train()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    logits, grads, size = passes(model, given)
    compaction = Compaction(model, ROWS)
    found = passes(model, given)
    compaction.remove()
    assert torch.equal(found[0], logits)
    assert alike(found[1], grads) > 0.99
    assert found[2] < 0.8 * size
    assert all(g.dtype == torch.bfloat16 for g in found[1].values())


def test_arguments_by_name() -> None:
    x, w, b = random(2, 4, 5, 6), random(6, 6, seed=1), random(6, seed=2)

    def named(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.linear(input=x, weight=w, bias=b)
        y = F.layer_norm(input=y, normalized_shape=(6,))
        y = F.rms_norm(input=F.silu(input=F.gelu(input=y, approximate="tanh")), normalized_shape=(6,))
        p = F.dropout(input=F.softmax(input=torch.matmul(input=y, other=y.mT), dim=-1), p=0.0)
        y = torch.mul(input=torch.relu(input=torch.matmul(input=p, other=y)), other=y)
        return F.scaled_dot_product_attention(query=y, key=y, value=y, dropout_p=0.0, is_causal=True)

    assert all(t is not None for t in compare(named, [x, w, b])[1])


def test_functional_transforms_are_left_alone() -> None:
    x, layer = random(2, 3, 6), nn.Linear(6, 6)
    model = Inside(lambda m, x: F.gelu(m(x)), layer)
    compaction = Compaction(model)
    found = torch.func.jvp(model, (x,), (x.detach(),))[1]
    compaction.remove()
    assert torch.equal(found, torch.func.jvp(model, (x,), (x.detach(),))[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_activation_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    model, given = model_of(family), batch(family)
    compaction = Compaction(model)
    logits, grads, _ = passes(model, given)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = passes(model, given)
    compaction.remove()
    assert torch.equal(found[0], logits)
    assert all(torch.allclose(found[1][n], g, atol=1e-6) for n, g in grads.items())


def test_a_copy_uses_its_own_weights() -> None:
    model, given = tiny("llama").train(), batch("llama")
    compaction = Compaction(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    reference = tiny("llama").train()
    reference.load_state_dict(other.state_dict())
    assert torch.equal(other(**given).logits, reference(**given).logits)
    assert passes(other, given)[2] < passes(reference, given)[2]
    compaction.remove()
    assert passes(other, given)[2] == passes(reference, given)[2], "nor is a copy compressed afterwards"


def test_a_forward_put_on_the_module_itself() -> None:
    """As accelerate does."""
    model, given = tiny("llama").train(), batch("llama")
    logits, _, size = passes(model, given)
    calls = []
    for module in (*model.model.layers, model.model.norm):
        own = module.forward

        def counted(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            calls.append(1)
            return own(*args, **kwargs)

        module.forward = counted
    held = [m.forward for m in model.model.layers]
    compaction = Compaction(model)
    found = passes(model, given)
    assert torch.equal(found[0], logits)
    assert found[2] < 0.7 * size
    assert len(calls) == 3
    compaction.remove()
    assert [m.forward for m in model.model.layers] == held


def test_an_error_inside_leaves_nothing_behind() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = Inside(fail)
    compaction = Compaction(model)
    with pytest.raises(KeyboardInterrupt):
        model(random(2, 2))
    assert not _get_current_function_mode_stack()
    compaction.remove()


def test_results_may_be_changed_in_place() -> None:
    x, layer = random(2, 3, 6), nn.Linear(6, 6)
    g, (to_x, *_), _ = compare(lambda m, x: F.gelu(m(x)).add_(1).mul_(2), [x], layer)
    q = quantised(layer(x), 2, 1).requires_grad_()
    inner = torch.autograd.grad(F.gelu(q), q, 2 * g)[0]
    assert close(to_x, inner @ layer.weight)


def tensors_on(node: Any) -> Iterator[Tensor]:
    for value in vars(node).values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Tensor):
                yield part


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_nothing_is_kept_where_hooks_do_not_see_it(family: str) -> None:
    model = model_of(family, "eager")
    compaction = Compaction(model)
    todo, seen, ours = [model(**batch(family)).loss.grad_fn], set(), 0
    compaction.remove()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [after for after, _ in node.next_functions]
        if type(node).__name__.removesuffix("Backward") in vars(compact):
            ours += 1
            assert not list(tensors_on(node))
    assert ours > 10


def test_a_second_thread_has_a_scope_of_its_own() -> None:
    sizes: list[int] = []

    def measured(x: Tensor) -> None:
        with saved_bytes(model) as saved:
            model(x)
        sizes.append(saved.bytes)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            beside = threading.Thread(target=measured, args=(x,))
            beside.start()
            beside.join()
        return m(x)

    model = Inside(run, nn.Linear(6, 4))
    compaction = Compaction(model)
    measured(random(2, 3, 6))
    compaction.remove()
    assert sizes == [36, 36]


def test_two_models_at_once() -> None:
    """Two models compressed at once keep their own formats."""
    models = [Inside(lambda m, x: m(x), nn.Linear(6, 4)) for _ in range(2)]
    made = [Compaction(m, s) for m, s in zip(models, (Settings(), Settings(operand=Fixed(4, 3))), strict=True)]
    x, sizes = random(2, 3, 6), []
    for model in itertools.chain(models, models):
        with saved_bytes(model) as saved:
            model(x)
        sizes.append(saved.bytes)
    assert sizes == [36, 18, 36, 18]
    for compaction in made:
        compaction.remove()
