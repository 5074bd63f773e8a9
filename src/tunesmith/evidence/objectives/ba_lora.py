"""BA-LoRA: the terms on logits made by hand, their slopes, padding and reference; worst-group accuracy on digits."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTForImageClassification

import tunesmith
from tunesmith.core.modelmap import block_linears
from tunesmith.core.reference import reference
from tunesmith.core.seeds import generator, seed_of
from tunesmith.evidence import kit_digits, kit_text, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.objectives.ba_lora import FORMS, BALoRA

BIAS, LITTLE = 0.95, 100
STEPS, ROWS, RATES = 200, 32, (3e-4, 1e-3, 3e-3)
OFF = {"lambda1": 0.0, "lambda2": 0.0, "lambda3": 0.0}
Batch = dict[str, Tensor]

CLAIM = Claim(
    "ba-lora",
    says="With the three terms PiSSA inherits less of the bias and noise of pretraining: Llama-2-7B reaches 26.18 on "
    "average over five tasks instead of 21.46 by PiSSA and 18.30 by LoRA, DeBERTa-v3 90.67 on GLUE instead of 89.47.",
    where="Section 4",
    ran="The terms on small matrices made by hand, their slopes, padding and the reference exactly. Then a ViT (width "
    "32) is trained for 500 steps on digits with a bright mark in one of two corners, in 95 % of the pictures the "
    "left one for even digits and the right one for odd ones. It is tuned by PiSSA (rank 4, all linear layers of its "
    "blocks) for 200 AdamW steps of 32 on 100 noisy pictures whose marks are random, without the terms and with them, "
    "weights and forms of the paper. Each side has three learning rates a factor of about 3 apart, chosen by accuracy "
    "on other pictures like those. Reported is the accuracy on unseen noisy pictures with each mark in turn, and that "
    "of the worst of the four groups: even or odd, left or right.",
    not_held="The diversity term is the likely cause. It grows with the fourth power of the logits, and logits of ten "
    "classes are correlated by nature: at the start of seed 0 it is 87.5, by its weight of 0.03 2.6, twice the task's "
    "1.30. Alone, with its own rate search, it gave 50.0 and 42.1 % in the worst group on seeds 0 and 1, where "
    "no term gave 52.2 and 50.0; consistency alone gave 53.3 and 51.7, the spectrum alone 52.2 and 50.0. On seed 2 the "
    "three terms were 1.6 points better than none. The paper's classification tasks have two or three classes.",
)


class _Table(nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table * 1)


def _random(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, key), dtype=torch.float64)


def _term(Z: Tensor, P: Tensor, number: int, **options: Any) -> tuple[float, Tensor]:
    """Term 1, 2 or 3 with weight 1 and its slope at Z, of a model that gave P before it was tuned."""
    if Z.dim() == 2:
        given = {"labels": torch.zeros(len(Z), dtype=torch.long)}
    else:
        ids = torch.ones(Z.shape[:2], dtype=torch.long)
        given = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    model, term = _Table(P), BALoRA(**{**OFF, f"lambda{number}": 1.0, **options})
    with term.watching(model):
        model()
    with torch.no_grad():
        model.table.copy_(Z)
    with term.watching(model):
        model()
    loss, _ = term(model, given)
    return float(loss.detach()), torch.autograd.grad(loss, model.table)[0]


def _case(kind: str) -> tuple[Tensor, Tensor]:
    shape = (9, 7) if kind == "classification" else (3, 9, 12)
    return _random(*shape, key="tuned"), _random(*shape, key="original")


@CLAIM.exact
def consistency_is_zero_at_the_original() -> list[Check]:
    """Where the logits are the original's, consistency is 0 in all four forms, and so is its slope."""
    value = slope = 0.0
    least = float("inf")
    for version, kind in FORMS:
        Z, P = _case(kind)
        at, gradient = _term(P, P, 1, version=version)
        value, slope = max(value, abs(at)), max(slope, float(gradient.abs().max()))
        least = min(least, _term(Z, P, 1, version=version)[0])
    return [
        Check("largest value", value, "<=", 1e-12),
        Check("largest slope", slope, "<=", 1e-12),
        Check("smallest value elsewhere", least, ">=", 1e-3),
    ]


@CLAIM.exact
def diversity_is_the_covariance() -> list[Check]:
    """Diversity is 0 for uncorrelated logits and what pencil and paper give for three rows of two."""
    Q = torch.linalg.qr(_random(12, 5, key="white") - _random(12, 5, key="white").mean(0))[0]
    three = torch.tensor([[1.0, 2.0], [3.0, 8.0], [5.0, 5.0]], dtype=torch.float64)
    return [
        Check("of uncorrelated logits", abs(_term(7 * Q + 3, Q, 2)[0]), "<=", 1e-12),
        # Centred columns (-2, 0, 2) and (-3, 3, 0): covariance 6 / 2 = 3, twice off the diagonal, over 2 classes.
        Check("difference from 9", abs(_term(three, three, 2)[0] - 9), "<=", 1e-12),
    ]


@CLAIM.exact
def spectrum_has_its_bounds() -> list[Check]:
    """The spectrum's term is -1 for logits of rank 1 and has its known value for orthogonal ones."""
    one = _random(8, 1, key="left") @ _random(1, 6, key="right")
    Q = torch.linalg.qr(_random(8, 6, key="orthogonal"))[0]
    # The last position of a row predicts nothing.
    row = nn.functional.pad(torch.linalg.qr(_random(40, 36, key="row"))[0], (0, 0, 0, 1))[None]
    single = nn.functional.pad(_random(40, 1, key="left") @ _random(1, 36, key="right"), (0, 0, 0, 1))[None]
    return [
        Check("rank 1, classification, difference from -1", abs(_term(one, one, 3)[0] + 1), "<=", 1e-12),
        Check("rank 1, generation, difference from -1", abs(_term(single, single, 3)[0] + 1), "<=", 1e-12),
        Check(
            "orthogonal, classification of v1, difference from -k / min(N, D)",
            abs(_term(Q, Q, 3, version="v1")[0] + 3 / 6),
            "<=",
            1e-12,
        ),
        Check(
            "orthogonal, generation, difference from -k / sqrt(min(N, D))",
            abs(_term(row, row, 3)[0] + 10 / 36**0.5),
            "<=",
            1e-12,
        ),
    ]


@CLAIM.exact
def slopes_are_finite_differences() -> list[Check]:
    """The slope of every term in every form is that of central differences."""
    worst, least = 0.0, float("inf")
    for version, kind in FORMS:
        Z, P = _case(kind)
        for number in (1, 2, 3):
            _, slope = _term(Z, P, number, version=version, k=2)
            for i in range(3):
                step = 1e-6 * _random(*Z.shape, key=f"step {i}")
                ahead, back = (_term(Z + sign * step, P, number, version=version, k=2)[0] for sign in (1, -1))
                found = float((slope * step).sum())
                worst = max(worst, abs(found - (ahead - back) / 2) / float(slope.norm() * step.norm()))
            least = min(least, float(slope.norm()))
    return [Check("largest relative error", worst, "<=", 1e-3), Check("smallest slope", least, ">=", 1e-3)]


def _adapted(config: Any) -> tuple[nn.Module, nn.Module]:
    """A small Llama, and the same with an adapter that has moved off its start."""
    base = kit_text.model(2, 0)
    with torch.no_grad():
        for p in base.parameters():
            if p.dim() == 2:
                p.mul_(8)
    model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), 0)
    g = generator(0, "moved")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return base, model.eval()


def _rows() -> Batch:
    ids = torch.randint(kit_text.BYTES, (4, 24), generator=generator(0, "ids"))
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@CLAIM.exact
def padding_and_the_cut_of_a_batch_change_nothing() -> list[Check]:
    """Padding changes no term, and micro-batches add up to the whole batch."""
    _, model = _adapted(tunesmith.adapter("pissa", rank=4))
    given, term = _rows(), BALoRA(lambda1=1.0, lambda2=1.0, lambda3=1.0)
    empty = torch.zeros(4, 5, dtype=torch.long)
    wide = {name: torch.cat([value, empty - 100 * (name == "labels")], 1) for name, value in given.items()}
    with torch.no_grad():
        loss, figures = term(model, given)
        other, padded = term(model, wide)
        total = term.count(given)
        cut = sum(term(model, {n: v[i : i + 1] for n, v in given.items()}, total)[0] for i in range(4))
    return [
        Check(
            "largest difference of a term by padding",
            max(float((figures[n] - padded[n]).abs()) for n in figures),
            "<=",
            1e-5,
        ),
        Check("difference of the loss by the cut", float((loss - cut).abs()), "<=", 1e-5),
        Check("rows", int(total), "==", 4),
        Check("difference of the loss by padding", abs(float(loss - other)), "<=", 1e-5),
    ]


@CLAIM.exact
def the_reference_is_the_untouched_model() -> list[Check]:
    """With PiSSA, SSF or LoRA on it, the reference gives the untouched model's logits; PEFT's PiSSA, off, does not."""
    apart, moved = 0.0, float("inf")
    for config in (
        tunesmith.adapter("pissa", rank=4),
        tunesmith.adapter("ssf"),
        LoraConfig(r=4, target_modules="all-linear"),
    ):
        base, model = _adapted(config)
        with torch.no_grad(), reference(model) as original:
            expected, found = base(**_rows()).logits, original(**_rows()).logits
        apart = max(apart, float((found - expected).abs().max()))
        with torch.no_grad():
            moved = min(moved, float((model(**_rows()).logits - expected).abs().max()))
    base, model = _adapted(LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    with torch.no_grad(), model.disable_adapter():
        off = float((model(**_rows()).logits - base(**_rows()).logits).abs().max())
    return [
        Check("largest difference of a logit", apart, "<=", 1e-5),
        Check("smallest distance of the tuned from the original model", moved, ">=", 0.1),
        Check("difference of a logit, PEFT's PiSSA switched off", off, ">=", 0.1),
    ]


@CLAIM.exact
def the_randomised_spectrum_is_close() -> Check:
    """On logits of `tiny-lm-s` for 64 tokens the randomised SVD gives the exact one's value."""
    ids = kit_text.windows("heldout", 2, 65, 0)
    with torch.no_grad():
        logits = kit_tune.language_model()(input_ids=ids).logits
    randomised, exact = (_term(logits, logits, 3, iterations=iterations)[0] for iterations in (2, 0))
    return Check("|randomised / exact - 1|", abs(randomised / exact - 1), "<=", 1e-2)


def _marked(x: Tensor, right: Tensor) -> Tensor:
    """Pictures whose upper left corner, or right where `right`, is bright, and the other dark."""
    x = x.clone()
    for corner, bright in ((slice(0, 2), ~right), (slice(6, 8), right)):
        x[:, :, :2, corner] = bright.float()[:, None, None, None] * 2 - 1
    return x


def _biased(x: Tensor, y: Tensor, share: float, seed: int) -> Tensor:
    """Marked on the right if odd, in this share of the pictures."""
    agrees = torch.rand(len(y), generator=generator(seed, "marks")) < share
    return _marked(x, (y % 2 == 1) == agrees)


def _tune(base: nn.Module, rows: kit_digits.Rows, terms: bool, lr: float, seed: int) -> nn.Module:
    config = tunesmith.adapter("pissa", rank=4, target_modules=block_linears(base))
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    term, draw = BALoRA(), generator(seed, "rows")
    x, y = rows
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / STEPS)
        chosen = torch.randint(len(y), (ROWS,), generator=draw)
        batch = {"pixel_values": x[chosen], "labels": y[chosen]}
        if terms:
            with term.watching(model):
                loss = model(**batch).loss
            loss = loss + term(model, batch)[0]
        else:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy in percent over both marks, and of the worst of the four groups."""
    groups = []
    for right in (False, True):
        marked = _marked(x, torch.full_like(y, right, dtype=torch.bool))
        groups += [kit_digits.accuracy(model, marked[y % 2 == odd], y[y % 2 == odd]) for odd in (0, 1)]
    even = float((y % 2 == 0).double().mean())
    mean = sum(share * value for share, value in zip((even, 1 - even) * 2, groups, strict=True)) / 2
    return {"accuracy": mean, "worst": min(groups)}


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Accuracy and worst group of the base, without the terms and with them."""
    data = kit_digits.load()
    x, y = data.train
    base: ViTForImageClassification = kit_digits.train(
        kit_digits.vit(seed), _biased(x, y, BIAS, seed), y, steps=500, lr=3e-3, seed=seed
    )
    little, choose, report = (
        (kit_digits.noisy(pictures, seed_of(seed, use)), labels)
        for use, (pictures, labels) in (
            ("tune", (x[:LITTLE], y[:LITTLE])),
            ("choose", data.validation),
            ("report", data.test),
        )
    )
    tuning = (_biased(*little, 0.5, seed_of(seed, "tuning")), little[1])
    choosing = (_biased(*choose, 0.5, seed_of(seed, "choosing")), choose[1])
    figures = {f"base_{name}": value for name, value in _measured(base, *report).items()}
    for name, terms in (("plain", False), ("terms", True)):
        best, figures[f"{name}_rate"] = kit_digits.search(
            lambda lr, terms=terms: _tune(base, tuning, terms, lr, seed),
            RATES,
            lambda model: kit_digits.accuracy(model, *choosing),
        )
        figures |= {f"{name}_{what}": value for what, value in _measured(best, *report).items()}
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold."""
    points = figures.median("terms_worst") - figures.median("plain_worst")
    return [Check("worst-group accuracy with the terms - without, points", points, ">=", 0)]
