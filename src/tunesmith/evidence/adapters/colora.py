"""CoLoRA: attributions and ranks exactly; restoration of degraded digits with ranks by contribution."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.colora import CoLoRA, contributions, rank_table
from tunesmith.core.importance import path_attribution
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.world.degradations import OPERATORS, Step, apply, count_sequences, degrade, psnr, sequences

KNOWN = tuple(name for name in OPERATORS if name != "stripes")
TASK = (Step("blur", 0.3), Step("stripes", 0.8), Step("noise", 0.5))
BATCH, FEW, WIDTH, BLOCKS = 16, 128, 32, 4
PRETRAIN, REFERENCE, TUNE = 400, 150, 200
PRETRAIN_RATES, RATES = (1e-3, 3e-3), (1e-3, 3e-3, 1e-2)

CLAIM = Claim(
    "colora",
    says="LoRA whose size per layer follows the layer's contribution to the task, on a restoration network pre-trained "
    "with random-order degradations, tunes 7 % of the parameters and restores about as well as full tuning, over six "
    "real tasks with NAFNet and 128 training images.",
    where="abstract; the project page",
    ran="Identities on small restoration networks. Then a residual network of 8 convolutions of 32 channels in its "
    "blocks (74,000 weights) is pre-trained on 1077 digits of 8 x 8, 400 AdamW steps of 16: by PROD with six "
    "operators, or with noise alone. The task is blur, then stripes, which no pre-training had, then noise, of fixed "
    "strengths, on 128 images. LoRA of 7 % of the parameters, 200 steps: ranks by FAIG (100 points on 64 images, "
    "reference tuned for 150 steps on the same 128), by the gradient, and all alike. Each pre-training has two "
    "learning rates, each LoRA three, chosen on 128 held-out images; reported is the PSNR on 360 others.",
)


class Restorer(nn.Module):
    """x + tail(blocks(head(x))), blocks h + conv(relu(conv(h)))."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.tail = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        for block in self.blocks:
            h = h + block(h)
        return x + self.tail(h)


class Mixed(nn.Module):
    """A block in the manner of NAFNet: 1 x 1, depthwise, gate, 1 x 1, and a linear layer for the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.channels = nn.Linear(width, width)
        self.back = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.depthwise(self.expand(x)).chunk(2, 1)
        h = self.grouped(left * right)
        h = h * self.channels(h.mean((2, 3)))[:, :, None, None]
        return x + self.back(h)


def _mixed(width: int, blocks: int, seed: int = 0) -> nn.Module:
    head, tail = (lambda: nn.Conv2d(1, width, 3, padding=1)), (lambda: nn.Conv2d(width, 1, 3, padding=1))
    return kit_digits.seeded(lambda: nn.Sequential(head(), *(Mixed(width) for _ in range(blocks)), tail()), seed)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _gradient(model: nn.Module, name: str) -> Tensor:
    gradient = _weight(model, name).grad
    assert gradient is not None
    return gradient


def _clean(rows: kit_digits.Rows) -> Tensor:
    return (rows[0] + 1) / 2


def _squares(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """FAIG's loss."""
    return (model(batch["x"]) - batch["y"]).square().sum()


def _train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, seed: int) -> nn.Module:
    """Mean absolute error with AdamW, the rate falling linearly to zero; changes the model and returns it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    draw = generator(seed, "train")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.l1_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def _quality(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return psnr(model(x), y)


def _small(steps: int = 60) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    """(a network pre-trained for a moment, the same tuned for another degradation, a batch of that)."""
    clean = _clean(kit_digits.load().train)[:FEW]
    base = kit_digits.seeded(lambda: Restorer(8, 2), 0)
    _train(base, apply(clean, [(Step("noise", 0.5),)] * FEW, 0), clean, steps, 3e-3, 0)
    x = apply(clean, [TASK] * FEW, 1)
    tuned = _train(copy.deepcopy(base), x, clean, steps, 3e-3, 1)
    return base, tuned, [{"x": x[:64], "y": clean[:64]}]


@CLAIM.exact
def signed_attributions_are_complete() -> list[Check]:
    """The signed attributions of all parameters sum to the change of the loss, the nearer the more points."""
    base, tuned, batches = _small()
    start, stop = ({n: p.detach() for n, p in model.named_parameters()} for model in (tuned, base))
    with torch.no_grad():
        change = float(_squares(base, batches[0]) - _squares(tuned, batches[0]))
    errors = {}
    for points in (10, 100):
        found = path_attribution(base, start, stop, batches, loss=_squares, points=points)
        errors[points] = abs(sum(float(v.sum()) for v in found.values()) / change - 1)
    return [
        Check("relative error at M = 100", errors[100], "<=", 0.05),
        Check("error at M = 100 / at M = 10", errors[100] / errors[10], "<=", 0.5),
    ]


@CLAIM.exact
def only_the_layer_that_changed_contributes() -> list[Check]:
    """Where the tuned model differs in one layer, that layer's contribution is 1 and every other's 0."""
    base, tuned, batches = _small()
    name = "blocks.1.0"
    state = dict(base.state_dict()) | {f"{name}.weight": tuned.state_dict()[f"{name}.weight"]}
    found = contributions(base, state, batches, _squares)
    others = [c for n, c in found.items() if n != name]
    return [Check("its contribution", found[name], "==", 1), Check("largest of the others", max(others), "==", 0)]


@CLAIM.exact
def contributions_are_those_of_the_definition() -> list[Check]:
    """Contributions and the gradient fallback equal sums over filters written out, on all kinds of layers."""
    base, x = _mixed(8, 2), _clean(kit_digits.load().train)[:32]
    batches = [{"x": apply(x, [TASK] * 32, 0), "y": x}]
    tuned = _train(copy.deepcopy(base), batches[0]["x"], x, 30, 3e-3, 0)
    names = CoLoRA.targets(base)
    sums = dict.fromkeys(names, 0.0)
    change = {name: (_weight(base, name) - _weight(tuned, name)).detach() for name in names}
    totals = {name: torch.zeros_like(value) for name, value in change.items()}
    for m in range(10):
        here = copy.deepcopy(tuned)
        with torch.no_grad():
            for p, q in zip(here.parameters(), base.parameters(), strict=True):
                p += (m / 10) * (q - p)
        _squares(here, batches[0]).backward()
        for name in names:
            totals[name] += _gradient(here, name) / 10
    for name in names:
        filters = (change[name] * totals[name]).abs()
        sums[name] = sum(float(each.sum()) for each in filters) / len(filters)
    found = contributions(base, tuned.state_dict(), batches, _squares, points=10)
    apart = max(abs(found[n] / (sums[n] / sum(sums.values())) - 1) for n in names)
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", budget=0.5))
    tunesmith.initialise(model, batches, loss=_squares)
    _squares(base, batches[0]).backward()
    gradients = {n: _gradient(base, n) for n in names}
    scores = {n: float(g.abs().sum() / len(g)) for n, g in gradients.items()}
    held = {m.layer.name: m for m in model.modules() if isinstance(m, CoLoRA)}
    wrong = sum(held[n].rank != r for n, r in rank_table(base, scores, budget=0.5).items())
    fallback = max(abs(held[n]._score / scores[n] - 1) for n in names)
    return [
        Check("layers scored", len(found), "==", 12),
        Check("largest relative difference of a contribution", apart, "<=", 1e-3),
        Check("largest relative difference of a gradient score", fallback, "<=", 1e-4),
        Check("layers of another rank than their gradient score gives", wrong, "==", 0),
    ]


@CLAIM.exact
def the_budget_is_spent_by_contribution() -> list[Check]:
    """200 random contributions on a wide network: parameters against the budget, and ranks in their order."""
    base, shares, inverted, below = _mixed(48, 12), [], 0, 0
    names = CoLoRA.targets(base)
    shapes = {name: tuple(_weight(base, name).shape) for name in names}
    total = sum(map(math.prod, shapes.values()))
    for i in range(200):
        draws = torch.randn(len(names), generator=generator(i, "scores")).mul(2).exp()
        scores = dict(zip(names, (draws / draws.sum()).tolist(), strict=True))
        table = rank_table(base, scores, budget=0.15)
        cost = sum(r * (shapes[n][0] + math.prod(shapes[n][1:])) for n, r in table.items())
        shares.append(cost / (0.15 * total))
        below += sum(r < 1 for r in table.values())
        for a, b in itertools.permutations(names, 2):
            inverted += shapes[a] == shapes[b] and scores[a] > scores[b] and table[a] < table[b]
    return [
        Check("smallest share of the budget that is used", min(shares), ">=", 0.98),
        Check("largest", max(shares), "<=", 1),
        Check("pairs of equal layers whose ranks are not in the order of their contributions", inverted, "==", 0),
        Check("layers below rank 1", below, "==", 0),
    ]


@CLAIM.exact
def merged_equals_unmerged() -> list[Check]:
    """Dense, grouped, depthwise and 1 x 1 convolutions and linear layers: merged outputs equal unmerged ones."""
    base, x = _mixed(16, 2), _clean(kit_digits.load().train)[:32]
    model = get_peft_model(copy.deepcopy(base), tunesmith.adapter("colora", budget=0.5))
    tunesmith.initialise(model, [{"x": x, "y": x}], loss=_squares)
    before = model(x).detach()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator(p.numel()))
    expected = model(x).detach()
    return [
        Check("largest difference of the start from the base", float((before - base(x).detach()).abs().max()), "==", 0),
        Check(
            "largest difference merged",
            float((model.merge_and_unload()(x).detach() - expected).abs().max()),
            "<=",
            1e-5,
        ),
        Check("largest change of the output", float((expected - before).abs().max()), ">=", 0.01),
    ]


@CLAIM.exact
def sequences_are_all_ordered_subsets() -> list[Check]:
    """PROD's sequences: how many there are of 7 and 8 operators, and that draws reach each of the 64 of 4."""
    drawn = sequences(4000, 0, KNOWN[:4])
    return [
        Check("ordered subsets of 7 operators", count_sequences(7), "==", 13_699),
        Check("of 8", count_sequences(8), "==", 109_600),
        Check("different ones of 4 in 4000 draws", len({tuple(s.name for s in steps) for steps in drawn}), "==", 64),
    ]


def _pretrained(seed: int, single: bool) -> tuple[nn.Module, float]:
    clean, rows = _clean(kit_digits.load().train), _clean(kit_digits.load().validation)[:FEW]

    def degraded(images: Tensor, key: int) -> Tensor:
        return degrade(images, key, ("noise",) if single else KNOWN)

    y = clean.repeat(4, 1, 1, 1)  # each picture degraded in four ways
    x, choose = degraded(y, seed), degraded(rows, 1000 + seed)
    return kit_digits.search(
        lambda lr: _train(kit_digits.seeded(lambda: Restorer(WIDTH, BLOCKS), seed), x, y, PRETRAIN, lr, seed),
        PRETRAIN_RATES,
        lambda model: _quality(model, choose, rows),
    )


@CLAIM.comparison
def restoration(seed: int) -> dict[str, float]:
    """PSNR on the new degradation at the best rate of each side, dB."""
    data = kit_digits.load()
    order = torch.randperm(len(data.train[0]), generator=generator(seed, "few"))[:FEW]
    few, rows, test = _clean(data.train)[order], _clean(data.validation)[:FEW], _clean(data.test)
    x, choose, report = (apply(y, [TASK] * len(y), s) for y, s in ((few, seed), (rows, 1000), (test, 2000)))
    batch = [{"x": x[:64], "y": few[:64]}]
    figures = {"degraded": psnr(report, test)}
    bases: dict[str, nn.Module] = {}
    tables: dict[str, Any] = {}
    for name in ("prod", "single"):
        base, figures[f"{name}_rate"] = _pretrained(seed, name == "single")
        figures[f"{name}_untuned"] = _quality(base, report, test)
        tuned = _train(copy.deepcopy(base), x, few, REFERENCE, 1e-3, seed)
        figures[f"{name}_reference"] = _quality(tuned, report, test)
        bases[name], tables[name] = base, rank_table(base, contributions(base, tuned.state_dict(), batch, _squares))
    alike = rank_table(bases["prod"], dict.fromkeys(tables["prod"], 1.0))

    def adapted(base: nn.Module, table: Any) -> nn.Module:
        config = tunesmith.adapter("colora", ranks=table)
        model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), seed)
        if table is None:
            kit_digits.seeded(lambda: tunesmith.initialise(model, batch, loss=_squares), seed)
        return model

    sides: dict[str, Callable[[], nn.Module]] = {
        "contribution": lambda: adapted(bases["prod"], tables["prod"]),
        "uniform": lambda: adapted(bases["prod"], alike),
        "gradient": lambda: adapted(bases["prod"], None),
        "single": lambda: adapted(bases["single"], tables["single"]),
    }
    for name, make in sides.items():
        model, figures[f"{name}_lora_rate"] = kit_digits.search(
            lambda lr, make=make: _train(make(), x, few, TUNE, lr, seed),
            RATES,
            lambda model: _quality(model, choose, rows),
        )
        figures[name] = _quality(model, report, test)
        figures[f"{name}_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures["largest_rank"], figures["smallest_rank"] = max(tables["prod"].values()), min(tables["prod"].values())
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's: contribution-based ranks are no worse than uniform ones, PROD no worse than one degradation."""

    def ahead(a: str, b: str) -> float:
        return figures.median(a) - figures.median(b)

    return [
        Check("PSNR, ranks by contribution - all alike, dB", ahead("contribution", "uniform"), ">=", 0),
        Check("PSNR, PROD - single degradation, tuned, dB", ahead("contribution", "single"), ">=", 0),
        Check("PSNR, PROD - single degradation, untuned, dB", ahead("prod_untuned", "single_untuned"), ">=", 0),
    ]
