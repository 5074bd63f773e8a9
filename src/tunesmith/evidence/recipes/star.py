"""STAR: mixed rankings, passes under dropout and the decay of B, exactly; fewer labels for the same accuracy."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.core.seeds import generator, subset
from tunesmith.core.uncertainty import scores, under_dropout
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.factor_decay import FactorDecay
from tunesmith.recipes.star import blend, top, unit

POOL, START, MORE, ROUNDS, STEPS = 600, 40, 40, 5, 80
RATES = (1e-3, 3e-3, 1e-2)

CLAIM = Claim(
    "star",
    says="Choosing what to label by the base's and the adapter's uncertainty, with LoRA's B under strong decay, beats "
    "random choice and other active learning on three reasoning tasks.",
    where="abstract; section 4",
    ran="Identities of the scores and of a step of the optimizer. Then a ViT trained on mirrored digits is tuned on "
    "the digits: LoRA of rank 8 with dropout 0.1 and the head, five rounds from 40 labels by 40 out of a pool of 600, "
    "a new adapter of 80 steps in each round. STAR chooses by -log p and trains with the decay of B; the baseline "
    "chooses at random and trains by AdamW; each half of STAR alone stands beside. Three learning rates each, chosen "
    "on validation rows. "
    "Compared is the mean test accuracy over the rounds, the area under the curve of labels.",
)


def _adapted(base: nn.Module, seed: int, dropout: float = 0.1) -> nn.Module:
    config = tunesmith.adapter("lora", rank=8, alpha=16, dropout=dropout, modules_to_save=["classifier"])
    return kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), seed)


def _batches(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": a, "labels": b} for a, b in zip(x.split(200), y.split(200), strict=True)]


@lru_cache
def _base(seed: int) -> nn.Module:
    x, y = kit_digits.load().train
    return kit_digits.train(kit_digits.vit(seed), x.flip(3), y, steps=400, lr=2e-3, seed=seed)


def _moved(dropout: float) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    base = kit_digits.vit(0)
    model = _adapted(base, 0, dropout)
    g = generator(0, "moved")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    x, y = kit_digits.load().train
    return base, model.eval(), _batches(x[:200], y[:200])


@CLAIM.exact
def the_weight_moves_from_base_to_adapter() -> list[Check]:
    """At w = 0 the ranking is the base's, at w = 1 the adapter's, at w = 0.3 that of the mixture."""
    base, model, batches = _moved(0.1)
    first, now = scores(base, batches), under_dropout(model, batches, "predictive", 3, 0).mean(0)
    rows = list(range(len(first)))

    def order(values: Tensor) -> list[int]:
        return top(rows, values, len(rows))

    by_hand = 0.7 * (first - first.min()) / (first.max() - first.min()) + 0.3 * unit(now)
    apart = [
        order(blend(unit(first), unit(now), -1)) != order(first),
        order(blend(unit(first), unit(now), 9)) != order(now),
        order(blend(unit(first), unit(now), 2)) != order(by_hand),
    ]
    return [
        Check("rankings that differ", sum(apart), "==", 0),
        Check(
            "places in which base and adapter differ",
            sum(a != b for a, b in zip(order(first), order(now), strict=True)),
            ">=",
            100,
        ),
    ]


@CLAIM.exact
def the_base_is_scored_with_the_adapter_off() -> Check:
    """-log p of the original through the model with its adapter switched off."""
    base, model, batches = _moved(0.1)
    with model.disable_adapter():
        off = scores(model, batches)
    return Check("largest difference of a score", float((off - scores(base, batches)).abs().max()), "<=", 1e-6)


@CLAIM.exact
def passes_differ_by_dropout_alone() -> list[Check]:
    """Three passes under dropout differ, without it they are one; the same keys give the same passes."""
    _, model, batches = _moved(0.1)
    first, again = (under_dropout(model, batches, "predictive", 3, 7) for _ in range(2))
    _, without, _ = _moved(0.0)
    return [
        Check("mean standard deviation of the passes", float(first.std(0).mean()), ">=", 1e-3),
        Check(
            "the same without dropout", float(under_dropout(without, batches, "predictive", 3, 7).std(0).max()), "==", 0
        ),
        Check("difference of the same passes", float((first - again).abs().max()), "==", 0),
        Check("modules left in training mode", sum(m.training for m in model.modules()), "==", 0),
    ]


@CLAIM.exact
def b_decays_and_a_does_not() -> list[Check]:
    """A step with zero gradients multiplies B by 1 - lr 0.5, and leaves A as it is, bit for bit."""
    _, model, _ = _moved(0.1)
    optimizer = FactorDecay(FactorDecay.groups(model), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    b = max(float((after[n] - 0.95 * p).abs().max()) for n, p in before.items() if "lora_B" in n)
    rest = sum(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" not in n)
    return [
        Check("largest difference of B from 0.95 B", b, "<=", 1e-7),
        Check("other tensors that moved", rest, "==", 0),
    ]


def _tuned(model: nn.Module, x: Tensor, y: Tensor, lr: float, seed: int, decaying: bool) -> nn.Module:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = (
        FactorDecay(FactorDecay.groups(model), lr) if decaying else torch.optim.AdamW(trained, lr, weight_decay=0.0)
    )
    draw = generator(seed, "rows")
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(x), (32,), generator=draw)
        optimizer.zero_grad()
        model(pixel_values=x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
    return model.eval()


def _curve(strategy: str, decaying: bool, lr: float, seed: int) -> tuple[list[float], list[float]]:
    """(validation, test) accuracy after each round."""
    data = kit_digits.load()
    x, y = data.train[0][:POOL], data.train[1][:POOL]
    base = _base(seed)
    base_scores = unit(scores(base, _batches(x, y)))
    labelled = subset(POOL, START, seed, "start")
    chosen, reported = [], []
    for t in range(ROUNDS):
        at = torch.tensor(labelled)
        model = kit_digits.seeded(lambda at=at: _tuned(_adapted(base, seed), x[at], y[at], lr, seed, decaying), seed)
        chosen.append(kit_digits.accuracy(model, *data.validation))
        reported.append(kit_digits.accuracy(model, *data.test))
        rest = [i for i in range(POOL) if i not in set(labelled)]
        if strategy == "random":
            labelled = labelled + [rest[i] for i in subset(len(rest), MORE, seed, "random", t)]
        else:
            now = under_dropout(model, _batches(x[rest], y[rest]), "predictive", 3, seed, t).mean(0)
            labelled = labelled + top(rest, blend(base_scores[rest], unit(now), t), MORE)
    return chosen, reported


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Mean test accuracy over the rounds, and after the last, at the best rate of each side."""
    figures: dict[str, float] = {}
    sides = {"star": ("star", True), "random": ("random", False), "choice": ("star", False), "decay": ("random", True)}
    for side, (strategy, decaying) in sides.items():
        curves = {lr: _curve(strategy, decaying, lr, seed) for lr in RATES}
        best = max(RATES, key=lambda lr: sum(curves[lr][0]))
        figures[side] = sum(curves[best][1]) / ROUNDS
        figures |= {f"{side}_rate": best, f"{side}_last": curves[best][1][-1], f"{side}_first": curves[best][1][0]}
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold: no more than a point behind random choice."""
    return [Check("STAR - random, points", figures.median("star") - figures.median("random"), ">=", -1.0)]
