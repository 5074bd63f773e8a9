"""Zeroth-order benchmark: slopes, variances, masks and bytes exactly; eleven methods at one budget of passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunesmith.core.directions import Directions, Mask
from tunesmith.core.meters import state_bytes
from tunesmith.core.optimizer import Closure
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.zo_benchmark import ZOBenchmark

PASSES, ROWS, EPS = 600, 64, 1e-3
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BACKWARD = 2
"""Forward passes that a backward pass counts for."""
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "one_sided": {"estimator": "one-sided"},
    "sign": {"update": "sign"},
    "momentum": {"update": "momentum"},
    "adam": {"update": "adam"},
    "conservative": {"update": "conservative", "estimator": "one-sided"},
    "forward_gradient": {"estimator": "forward-gradient"},
    "block_wise": {"unit": "block"},
    "sparse": {"sparsity": 0.5},
    "sparse_by_magnitude": {"sparsity": 0.5, "sparsity_by": "magnitude"},
    "hybrid": {"first_order": 1},
}

CLAIM = Claim(
    "zo-benchmark",
    says="Compares six optimizers without backpropagation: forward gradients are the strong baseline, and block-wise "
    "descent, hybrid training and sparse perturbations improve zeroth-order fine-tuning.",
    where="abstract; sections 4 and 5",
    ran="Forward gradients against autograd on a Llama and a GPT-2 with fused attention, and differences against them; "
    "800 block-wise sweeps of a quadratic with 5 blocks of 10 numbers; masks of a Llama; state in bytes; "
    "conservative steps at a rate where others diverge. Then, as the paper's tables do, every method with the same "
    "budget: a residual MLP, pretrained on digits, is moved to digits that are shifted by up to a pixel, with 600 "
    "forward passes of 64 pictures (a backward pass counts for two) and the best of five learning rates by 360 "
    "pictures; reported on 360 others. First-order SGD stands beside them. The order is reported and not judged, only "
    "that every method learns.",
)


def _small(kind: str) -> PreTrainedModel:
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return kit_digits.seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval(), 0)
    return kit_digits.seeded(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=2, n_embd=32, n_head=4)).eval(), 0
    )


def _text_loss(model: PreTrainedModel) -> Closure:
    ids = torch.randint(64, (4, 16), generator=generator("zo-benchmark", "ids"))
    return lambda: model(input_ids=ids, labels=ids).loss


def _slope(loss: Closure, parameters: Sequence[nn.Parameter], seed: int) -> float:
    """<gradient, z> by a backward pass."""
    grads = torch.autograd.grad(loss(), parameters)
    z = [nn.Parameter(torch.zeros_like(p)) for p in parameters]
    Directions([{"params": z}]).add_(seed, 1.0)
    return sum(float((g.double() * d.detach().double()).sum()) for g, d in zip(grads, z, strict=True))


# Exact ----------------------------------------------------------------------------------------------------------------


@CLAIM.exact
def a_forward_gradient_is_the_slope() -> list[Check]:
    """Along five directions, one forward pass finds <gradient, z>; central differences approach it as eps falls."""
    worst = 0.0
    for kind in ("llama", "gpt2"):
        model = _small(kind)
        loss, parameters = _text_loss(model), list(model.parameters())
        directions = Directions([{"params": parameters}])
        for seed in range(5):
            true = _slope(loss, parameters, seed)
            worst = max(worst, abs(directions.derivative(loss, seed)[1] - true) / max(abs(true), 1.0))
    data, vit = kit_digits.load(), kit_digits.vit(0).double()
    x, y = data.train[0][:ROWS].double(), data.train[1][:ROWS]
    smooth, parameters = lambda: F.cross_entropy(kit_digits.logits(vit, x), y), list(vit.parameters())
    directions, errors = Directions([{"params": parameters}]), []
    for eps in (1e-2, 1e-3, 1e-4):
        apart = []
        for seed in range(5):
            true = _slope(smooth, parameters, seed)
            with torch.no_grad():
                apart.append(abs(directions.probe(smooth, seed, eps).coefficient - true) / max(abs(true), 1.0))
        errors.append(max(apart))
    return [
        Check("largest error, forward gradient", worst, "<=", 1e-5),
        Check("central difference, error at eps 1e-2 / at 1e-3", errors[0] / errors[1], ">=", 10.0),
        Check("central difference, error at eps 1e-3 / at 1e-4", errors[1] / errors[2], ">=", 10.0),
    ]


@CLAIM.exact
def a_sweep_of_blocks_is_unbiased_with_less_variance() -> list[Check]:
    """A sweep over L = 5 blocks costs 2 L passes; its sum points along the gradient, with the variance of d / L."""
    g = generator("zo-benchmark", "quadratic")
    A = torch.randn(50, 50, generator=g, dtype=torch.float64) / 7
    start = torch.randn(50, generator=g, dtype=torch.float64)
    true, lr = A.T @ A @ start, 1e-7
    sums, variance, calls = {}, {}, 0
    for unit in ("block", "model"):
        parts = [nn.Parameter(t.clone()) for t in start.split(10)]
        groups = [{"params": [p], "unit": str(i) if unit == "block" else "all"} for i, p in enumerate(parts)]
        optimizer = ZOBenchmark(groups, lr=lr, unit=unit)
        calls = 0

        def closure(parts: list[nn.Parameter] = parts) -> Tensor:
            nonlocal calls
            calls += 1
            return (A @ torch.cat([p.detach() for p in parts])).square().sum() / 2

        found = []
        for _ in range(800):
            with torch.no_grad():
                for p, t in zip(parts, start.split(10), strict=True):
                    p.copy_(t)
            optimizer.step(closure)
            found.append((start - torch.cat([p.detach() for p in parts])) / lr)
        estimates = torch.stack(found)
        sums[unit], variance[unit] = estimates.mean(0), float((estimates - true).square().sum(1).mean())
        if unit == "block":
            per_sweep = calls / 800
    return [
        Check("passes of a sweep over 5 blocks", per_sweep, "==", 10.0),
        Check("cosine of the mean with the gradient", float(F.cosine_similarity(sums["block"], true, 0)), ">=", 0.99),
        Check("variance, block-wise / whole", variance["block"] / variance["model"], "<=", 0.3),
    ]


@CLAIM.exact
def as_much_is_masked_as_was_asked() -> list[Check]:
    """Share of the numbers that a sparse direction leaves out, uniform and by magnitude."""
    worst = {"uniform": 0.0, "magnitude": 0.0}
    for kind, share in itertools.product(worst, (0.1, 0.5, 0.9)):
        model = _small("llama")
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = ZOBenchmark(model.parameters(), lr=1e-2, sparsity=share, sparsity_by=kind, restore="exact")  # type: ignore[arg-type]
        optimizer.step(_text_loss(model))
        pairs = list(zip(before, model.parameters(), strict=True))
        still = sum(int((b == p).sum()) for b, p in pairs) / sum(b.numel() for b in before)
        worst[kind] = max(worst[kind], abs(still - share))
    zeros = [nn.Parameter(torch.zeros(1000, 1000))]
    Directions([{"params": zeros}], mask=Mask(0, 0.9)).add_(0, 1.0)
    return [
        *(
            Check(f"largest difference from the share asked, {kind}", value, "<=", 0.01)
            for kind, value in worst.items()
        ),
        Check("difference at 0.9 of a million numbers", abs(float((zeros[0] == 0).float().mean()) - 0.9), "<=", 0.002),
    ]


@CLAIM.exact
def state_is_what_the_update_needs() -> list[Check]:
    """Bytes of state per trained number after a step."""
    expected = {"sgd": 0, "sign": 0, "conservative": 0, "momentum": 4, "adam": 8}
    checks = []
    for update, wanted in expected.items():
        model = _small("llama")
        optimizer = ZOBenchmark(model.parameters(), lr=1e-4, update=update)  # type: ignore[arg-type]
        optimizer.step(_text_loss(model))
        numbers = sum(p.numel() for p in model.parameters())
        checks.append(Check(f"bytes per number, {update}", state_bytes(optimizer) / numbers, "==", float(wanted)))
    return checks


@CLAIM.exact
def a_conservative_step_never_raises_the_loss() -> list[Check]:
    """20 steps on one batch at a rate where plain steps raise its loss."""
    worst = {}
    for update in ("conservative", "sgd"):
        model = _small("llama")
        loss, losses = _text_loss(model), list[float]()
        optimizer = ZOBenchmark(model.parameters(), lr=1e-2, update=update, restore="exact")
        for _ in range(20):
            with torch.no_grad():
                losses.append(float(loss()))
            optimizer.step(loss)
        worst[update] = max(after - before for before, after in itertools.pairwise(losses))
    return [
        Check("largest rise of the loss in a step, conservative", worst["conservative"], "<=", 1e-6),
        Check("the same, sgd", worst["sgd"], ">=", 1e-2),
    ]


# Comparison -----------------------------------------------------------------------------------------------------------


def adapt(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: kit_digits.Rows, steps: int, seed: int
) -> nn.Module:
    """Cross-entropy on random batches with a learning rate that falls to zero; by closures, or by gradients."""
    draw, rates = generator("zo-benchmark", "batches", seed), [group["lr"] for group in optimizer.param_groups]
    x, y = rows
    model.eval()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        chosen = torch.randint(len(x), (ROWS,), generator=draw)

        def closure(chosen: Tensor = chosen) -> Tensor:
            return F.cross_entropy(kit_digits.logits(model, x[chosen]), y[chosen])

        if isinstance(optimizer, ZOBenchmark):
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
    return model


def made(model: nn.Module, name: str, lr: float, seed: int) -> tuple[torch.optim.Optimizer, int]:
    """A method of `METHODS` or `first_order`, and the passes that a step of it counts for."""
    if name == "first_order":
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=lr), 1 + BACKWARD
    options = METHODS[name]
    optimizer = ZOBenchmark(ZOBenchmark.groups(model, **options), lr=lr, eps=EPS, seed=seed, **options)
    return optimizer, optimizer.passes() + BACKWARD * bool(options.get("first_order"))


def held(model: nn.Module, rows: kit_digits.Rows) -> float:
    """Mean cross-entropy, nats."""
    with torch.no_grad():
        value = float(F.cross_entropy(kit_digits.logits(model, rows[0]), rows[1]))
    return value if value == value else float("inf")


@CLAIM.comparison
def at_one_budget(seed: int) -> dict[str, float]:
    data = kit_digits.load()
    start = kit_digits.train(kit_digits.mlp(seed), *data.train, steps=300, lr=2e-3, seed=seed)
    moved: Callable[[Tensor], Tensor] = lambda x: kit_digits.shifted(x, seed)  # noqa: E731
    target, weights = data.each(moved), kit_digits.snapshot(start)
    figures = {"before": kit_digits.accuracy(start, *target.test), "before_loss": held(start, target.test)}
    for name in (*METHODS, "first_order"):
        runs = []
        for lr in RATES:
            model = kit_digits.mlp(seed)
            model.load_state_dict(dict(weights))
            optimizer, passes = made(model, name, lr, seed)
            adapt(model, optimizer, target.train, PASSES // passes, seed)
            scores = held(model, target.test), kit_digits.accuracy(model, *target.test)
            runs.append((held(model, target.validation), *scores, lr))
        _, figures[f"{name}_loss"], figures[name], figures[f"{name}_lr"] = min(runs)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    before = figures.median("before_loss")
    worst = max(figures.median(f"{name}_loss") - before for name in METHODS)
    return [Check("held-out loss, the worst method - before, nats", worst, "<=", 0.0)]
