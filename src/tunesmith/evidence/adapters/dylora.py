"""DyLoRA: prefixes, gradients and draws, exactly; every rank of one training against a truncated LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.dylora import DyLoRA
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim, Figures

RANK, ALPHA, DIM = 8, 16.0, 32
STEPS, ROWS, RATES = 1200, 64, (3e-3, 1e-2, 3e-2)
RANKS = range(1, RANK + 1)

CLAIM = Claim(
    "dylora",
    says="One training gives an adapter at every rank up to R, 4 to 7 times faster than training a LoRA per rank, and "
    "performs consistently over a much larger range of ranks.",
    where="abstract",
    ran="Identities on a small Llama, its attention and feed-forward layers adapted at rank 8. Then a 32 x 32 linear "
    "layer learns to be another one whose difference has the singular values 4 x 0.6^i, from 1200 batches of 64 "
    "normal inputs with Adam at a constant rate: DyLoRA at rank 8 with both of its ways to update, and LoRA of rank 8, "
    "cut to its first b components. The loss is relative to no adapter. Each side has three learning rates a factor "
    "of about 3 apart, chosen by what it was trained for: the mean over the ranks, or the loss at rank 8. The best "
    "approximations of the trained LoRA (`lora_svd`) are reported beside, without a threshold.",
)


def _adapted(frozen: bool = True) -> tuple[nn.Module, nn.Module]:
    """A small Llama, and the same with DyLoRA that has moved off its start."""
    base = kit_text.model(2, 0)
    config = tunesmith.adapter("dylora", rank=RANK, alpha=ALPHA, frozen=frozen)
    model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), 0)
    g = generator(0, "moved")
    with torch.no_grad():
        for made in _layers(model):
            made.B.copy_(0.1 * torch.randn(made.B.shape, generator=g))
    return base, model


def _layers(model: nn.Module) -> list[DyLoRA]:
    return [m for m in model.modules() if isinstance(m, DyLoRA)]


def _ids(rows: int = 2) -> Tensor:
    return torch.randint(kit_text.BYTES, (rows, 16), generator=generator(0, "ids"))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=_ids()).logits


@CLAIM.exact
def every_prefix_is_an_adapter() -> list[Check]:
    """At rank b the model is the base with (alpha / b) B[:, :b] A[:b] added to each weight, merged by hand."""
    base, model = _adapted()
    apart, results = 0.0, []
    for b in RANKS:
        by_hand = copy.deepcopy(base)
        with torch.no_grad():
            for made in _layers(model):
                weight: Tensor = by_hand.get_submodule(made.layer.name).weight  # type: ignore[assignment]
                weight += ALPHA / b * made.B[:, :b] @ made.A[:b]
        tunesmith.deploy(model, rank=b)
        results.append(_logits(model))
        apart = max(apart, float((results[-1] - _logits(by_hand)).abs().max()))
    between = min(float((x - y).abs().max()) for i, x in enumerate(results) for y in results[:i])
    return [
        Check("largest difference of a logit at the ranks 1 to 8", apart, "<=", 1e-5),
        Check("smallest largest difference between two ranks", between, ">=", 1e-2),
    ]


@CLAIM.exact
def export_is_a_lora_of_rank_b() -> list[Check]:
    """Exported at rank b and loaded by PEFT, it is a plain LoRA of rank b with the same logits."""
    base, model = _adapted()
    apart, wrong = 0.0, 0
    for b in RANKS:
        tunesmith.deploy(model, rank=b)
        with TemporaryDirectory() as folder:
            tunesmith.export_lora(model, Path(folder) / "lora")
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/lora")
        wrong += loaded.peft_config["default"].r != b
        apart = max(apart, float((_logits(loaded) - _logits(model)).abs().max()))
    return [
        Check("largest difference of a logit at the ranks 1 to 8", apart, "<=", 1e-6),
        Check("exports of another rank than asked for", wrong, "==", 0),
    ]


@CLAIM.exact
def what_a_step_moves() -> list[Check]:
    """A step moves component b alone, or the components 1 to b; AdamW with momentum and decay, 30 steps."""
    checks = []
    for frozen in (True, False):
        _, model = _adapted(frozen)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        gradients = moved = 0
        for step in range(30):
            before = [(made.A.detach().clone(), made.B.detach().clone()) for made in _layers(model)]
            with tunesmith.step(model.train(), step):
                drawn = {made.drawn for made in _layers(model)}
                model(input_ids=_ids(), labels=_ids()).loss.backward()
                grads = [(made.A.grad, made.B.grad) for made in _layers(model)]
                optimizer.step()
            b = drawn.pop()
            learning = {b - 1} if frozen else set(range(b or 0))
            for made, (A, B), (dA, dB) in zip(_layers(model), before, grads, strict=True):
                gradients += bool(drawn) or _components(dA, dB) != learning
                moved += _components(made.A.detach() - A, made.B.detach() - B) != learning
            optimizer.zero_grad()
        mode = "component b alone" if frozen else "components 1 to b"
        checks.append(Check(f"layers with a gradient on other than {mode}", gradients, "==", 0))
        if frozen:
            checks.append(Check(f"layers that moved in other than {mode}", moved, "==", 0))
    return checks


def _components(A: Tensor | None, B: Tensor | None) -> set[int]:
    """The components on which (r, in) and (out, r) are not zero."""
    assert A is not None
    assert B is not None
    return {i for i in range(RANK) if bool(A[i].any()) or bool(B[:, i].any())}


@CLAIM.exact
def draws_are_uniform() -> list[Check]:
    """Over 4,000 steps each rank is drawn in one of 8, the same one in every layer."""
    _, model = _adapted(frozen=False)
    steps, p = 4000, 1 / RANK
    counts, several = [0] * RANK, 0
    for step in range(steps):
        with tunesmith.step(model, step):
            drawn = {made.drawn or 0 for made in _layers(model)}
        several += len(drawn) != 1
        counts[drawn.pop() - 1] += 1
    worst = max(abs(count - steps * p) for count in counts) / math.sqrt(steps * p * (1 - p))
    return [
        Check("steps in which layers drew different ranks", several, "==", 0),
        Check("largest deviation of a rank's count, standard deviations", worst, "<=", 3),
    ]


def _wanted(seed: int) -> Tensor:
    """What the layer's weight is to change by, (DIM, DIM), singular values 4 x 0.6^i."""
    g = generator(seed, "wanted")
    left, right = (torch.linalg.qr(torch.randn(DIM, DIM, generator=g))[0] for _ in range(2))
    return left * (4 * 0.6 ** torch.arange(DIM)) @ right.T


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _tuned(kind: str, lr: float, seed: int) -> list[Tensor]:
    """The changes of the weight at the ranks 1 to 8 after training."""
    options = {} if kind == "lora" else {"frozen": kind == "frozen", "seed": seed}
    config = tunesmith.adapter(
        "lora" if kind == "lora" else "dylora", rank=RANK, alpha=ALPHA, target_modules=["layer"], **options
    )
    model = kit_digits.seeded(lambda: get_peft_model(_Student(), config), seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    wanted, g = _wanted(seed), generator(seed, "inputs")
    for step in range(STEPS):
        x = torch.randn(ROWS, DIM, generator=g)
        with tunesmith.step(model.train(), step):
            (model(x) - x @ wanted.T).square().sum(1).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        if kind == "lora":
            held = model.get_submodule("base_model.model.layer")
            A, B = held.lora_A["default"].weight, held.lora_B["default"].weight
            return [ALPHA / RANK * B[:, :b] @ A[:b] for b in RANKS]
        made = _layers(model)[0]
        return [ALPHA / b * made.B[:, :b] @ made.A[:b] for b in RANKS]


def _losses(changes: Sequence[Tensor], wanted: Tensor) -> list[float]:
    """Expected squared error over normal inputs, relative to no change at all: a ratio of squared Frobenius norms."""
    return [float((wanted - change).square().sum() / wanted.square().sum()) for change in changes]


@CLAIM.comparison
def teacher(seed: int) -> dict[str, float]:
    """Relative loss at each rank at the best rate of each side."""
    wanted, figures = _wanted(seed), dict[str, float]()
    for kind in ("lora", "all", "frozen"):
        runs = {lr: _tuned(kind, lr, seed) for lr in RATES}
        found = {lr: _losses(changes, wanted) for lr, changes in runs.items()}
        best = min(RATES, key=lambda lr, found=found, kind=kind: found[lr][-1] if kind == "lora" else sum(found[lr]))
        figures |= {f"{kind}_{b}": loss for b, loss in zip(RANKS, found[best], strict=True)}
        figures[f"{kind}_rate"] = best
        if kind == "lora":
            U, S, Vh = torch.linalg.svd(runs[best][-1])
            cut = [U[:, :b] * S[:b] @ Vh[:b] for b in RANKS]
            figures |= {f"lora_svd_{b}": loss for b, loss in zip(RANKS, _losses(cut, wanted), strict=True)}
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds, on both ways to update."""
    checks = []
    for kind, name in (("all", "components 1 to b"), ("frozen", "component b alone")):
        for b in range(1, 5):
            ratio = figures.median(f"{kind}_{b}") / figures.median(f"lora_{b}")
            checks.append(Check(f"loss / truncated LoRA's at rank {b}, {name} learning", ratio, "<=", 0.6))
        checks.append(Check(f"relative loss at rank 8, {name} learning", figures.median(f"{kind}_8"), "<=", 0.10))
    return checks
