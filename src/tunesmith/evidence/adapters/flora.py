"""FLoRA: the Tucker form, its ranks and counts, exactly; a planted change of a convolution against flattened LoRA."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.flora import FLoRA
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures

OUT, IN, KERNEL = 16, 12, 3
RANK, KERNEL_RANK, LORA_RANK = 4, 2, 2
STEPS, ROWS, RATES = 500, 16, (5e-3, 2e-2, 8e-2)
TUNING_STEPS, TUNING_RATES = 200, (1e-3, 4e-3, 1.6e-2)

CLAIM = Claim(
    "flora",
    says="A small core of the weight's own dimensions keeps the structure of a convolution's change that flattening it "
    "into a matrix destroys; with a similar or smaller budget it is better than LoRA on vision, language and "
    "multimodal tasks.",
    where="abstract; Section 3",
    ran="Identities on linear, embedding and convolution layers in 1 to 3 dimensions. Then a 12 -> 16 convolution of "
    "3 x 3 learns from white inputs to change its weight by a planted amount of its own norm, 500 Adam steps with a "
    "cosine: a Tucker change of ranks 4, 4, 2, 2, and beside it, without a threshold, one whose flattened matrix has "
    "rank 2. FLoRA of ranks 4, 4, 2, 2 (188 numbers) and LoRA of rank 2 (248), three rates each, the best by the loss "
    "itself; the loss is the squared distance left over that at the start. `svd` is the least that any LoRA of rank 2 "
    "can leave. Also without a threshold: a CNN of three convolutions trained on mirrored digits is tuned to the "
    "digits in its last two, FLoRA with 472 numbers and LoRA with 672, 200 AdamW steps, the best of three rates by "
    "the validation accuracy.",
)


def _random(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, key))


def _layers() -> list[nn.Module]:
    return [
        nn.Linear(10, 7),
        nn.Embedding(9, 6),
        nn.Conv1d(6, 8, 3, stride=2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, (3, 2), padding="same", padding_mode="circular"),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv3d(4, 6, 2, dilation=2),
    ]


def _made(layer: nn.Module, **options: Any) -> FLoRA:
    """FLoRA moved off its start."""
    made = FLoRA(describe(layer, "layer"), **{"rank": 3, "out_rank": 4, "scale": 2.0, "dropout": 0.0, **options})
    with torch.no_grad():
        made.core.copy_(_random(*made.ranks, key="core"))
    return made


def _input(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(8).view(2, 4)
    spec = describe(layer, "layer")
    return _random(2, spec.shape[1] * spec.groups, *[9] * (len(spec.shape) - 2), key="input")


@CLAIM.exact
def change_is_the_tucker_product() -> list[Check]:
    """The change is s times the core multiplied by each factor; so is the output, which is computed without it."""
    apart, outputs = 0.0, 0.0
    for layer in _layers():
        made = _made(layer)
        small, large = "abcde"[: len(made.ranks)], "vwxyz"[: len(made.ranks)]
        terms = ",".join([small, *(b + a for a, b in zip(small, large, strict=True))])
        wanted = 2.0 * torch.einsum(f"{terms}->{large}", made.core, *made.factors)
        W: Tensor = layer.weight  # type: ignore[assignment]
        apart = max(apart, float((made.delta() - wanted).abs().max().detach() / wanted.abs().max().detach()))
        x, below = _input(layer), stacked(layer, made.layer, [])
        expected = below.apply(x, W + wanted, below.bias)
        outputs = max(outputs, float((made(x, below) - expected).abs().max().detach() / expected.abs().max().detach()))
    return [
        Check("largest relative difference of a change", apart, "<=", 1e-6),
        Check("largest relative difference of an output", outputs, "<=", 1e-5),
    ]


@CLAIM.exact
def starts_at_the_base() -> list[Check]:
    """At creation the output is the base's bit for bit, and the first step moves the core alone."""
    different = moved = stuck = 0
    for layer in _layers():
        made = FLoRA(describe(layer, "layer"), rank=3)
        x, below = _input(layer), stacked(layer, made.layer, [])
        out = made(x, below)
        different += not torch.equal(out, layer(x))
        out.square().sum().backward()
        stuck += not bool(made.core.grad.any())
        moved += sum(bool(U.grad.any()) for U in made.factors)
    return [
        Check("layers whose output differs", different, "==", 0),
        Check("cores without a gradient", stuck, "==", 0),
        Check("factors with a gradient", moved, "==", 0),
    ]


@CLAIM.exact
def merged_equals_unmerged() -> Check:
    """Merged outputs equal unmerged ones for strides, paddings, dilations and groups, in 1 to 3 dimensions."""
    apart = 0.0
    for layer in _layers():
        config = tunesmith.adapter("flora", rank=3, target_modules=["0"])
        model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
        with torch.no_grad():
            for made in (m for m in model.modules() if isinstance(m, FLoRA)):
                made.core.copy_(_random(*made.ranks, key="core"))
            x = _input(layer)
            expected = model(x)
            apart = max(apart, float((model.merge_and_unload()(x) - expected).abs().max() / expected.abs().max()))
    return Check("largest relative difference", apart, "<=", 1e-5)


@CLAIM.exact
def numbers_that_train() -> list[Check]:
    """The count is the product of the ranks and d_n r_n for each dimension; 188 for the convolution below."""
    wrong = 0
    for layer in _layers():
        made = _made(layer)
        sizes = tuple(layer.weight.shape)  # type: ignore[arg-type]
        wanted = math.prod(made.ranks) + sum(d * r for d, r in zip(sizes, made.ranks, strict=True))
        wrong += made.trainable_count() != wanted
    conv = _made(nn.Conv2d(IN, OUT, KERNEL), rank=RANK, out_rank=RANK)
    return [
        Check("layers with another count", wrong, "==", 0),
        Check("numbers of ranks 4, 4, 2, 2", conv.trainable_count(), "==", 188),
    ]


def _ranks(change: Tensor) -> list[int]:
    """The rank of the unfolding along each dimension, singular values under 1e-5 of the largest left out."""
    unfolded = (change.double().movedim(n, 0).flatten(1) for n in range(change.dim()))
    return [int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) for matrix in unfolded]


@CLAIM.exact
def ranks_of_the_trained_change() -> list[Check]:
    """After training to a change of full rank, each unfolding has the rank given; a flattened LoRA fills the kernel."""
    base, wanted = _conv(0), _random(OUT, IN, KERNEL, KERNEL, key="full")
    flora, lora = (_ranks(_tuned(kind, base, wanted, 2e-2, 0, 60)) for kind in ("flora", "lora"))
    allowed = (RANK, RANK, KERNEL_RANK, KERNEL_RANK)
    excess = max(found - most for found, most in zip(flora, allowed, strict=True))
    return [
        Check("FLoRA: largest excess over the ranks 4, 4, 2, 2", excess, "<=", 0),
        Check("LoRA: smaller rank along the kernel's two dimensions", min(lora[2:]), "==", KERNEL),
    ]


def _conv(seed: int) -> nn.Conv2d:
    return kit_digits.seeded(lambda: nn.Conv2d(IN, OUT, KERNEL, bias=False), seed)


def _planted(kind: str, base: nn.Conv2d, seed: int) -> Tensor:
    """A change of the norm of the base's weight, (OUT, IN, KERNEL, KERNEL)."""
    g = generator(seed, "planted", kind)
    if kind == "tucker":
        shape, ranks = (OUT, IN, KERNEL, KERNEL), (RANK, RANK, KERNEL_RANK, KERNEL_RANK)
        factors = [torch.randn(d, r, generator=g) for d, r in zip(shape, ranks, strict=True)]
        change = torch.einsum("abcd,wa,xb,yc,zd->wxyz", torch.randn(ranks, generator=g), *factors)
    else:
        inputs = IN * KERNEL * KERNEL
        change = torch.randn(OUT, LORA_RANK, generator=g) @ torch.randn(LORA_RANK, inputs, generator=g)
        change = change.view(OUT, IN, KERNEL, KERNEL)
    return change * base.weight.detach().norm() / change.norm()


def _tuned(kind: str, base: nn.Conv2d, wanted: Tensor, lr: float, seed: int, steps: int = STEPS) -> Tensor:
    """The change of the weight after training towards `wanted`."""
    options: dict[str, Any] = {"rank": LORA_RANK, "alpha": LORA_RANK * 4.0}
    if kind == "flora":
        options = {"rank": RANK, "kernel_rank": KERNEL_RANK, "dropout": 0.0}
    config = tunesmith.adapter(kind, target_modules=["0"], **options)
    model = kit_digits.seeded(lambda: get_peft_model(nn.Sequential(copy.deepcopy(base)), config), seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    goal, g = base.weight.detach() + wanted, generator(seed, "inputs")
    for _ in range(steps):
        x = torch.randn(ROWS, IN, 6, 6, generator=g)
        (model(x) - F.conv2d(x, goal)).square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    merged: Any = model.merge_and_unload()
    return merged[0].weight.detach() - base.weight.detach()


def _left(change: Tensor, wanted: Tensor) -> float:
    """Squared distance to the planted change, relative to that of no change."""
    return float((wanted - change).square().sum() / wanted.square().sum())


class _CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        return self.head(F.relu(self.third(x)).mean((2, 3)))


def _digits(seed: int) -> dict[str, float]:
    """Test accuracy of a CNN that knows mirrored digits, tuned to the digits in its last two convolutions."""
    data = kit_digits.load()
    (x, y), figures = data.train, dict[str, float]()
    base = kit_digits.train(kit_digits.seeded(_CNN, seed), x.flip(3), y, steps=500, lr=5e-3, seed=seed)
    figures["digits_before"] = kit_digits.accuracy(base, *data.test)
    for kind, options in (
        ("flora", {"rank": RANK, "kernel_rank": KERNEL_RANK, "dropout": 0.0}),
        ("lora", {"rank": LORA_RANK}),
    ):

        def tuned(lr: float, kind: str = kind, options: dict[str, Any] = options) -> nn.Module:
            config = tunesmith.adapter(kind, target_modules=["second", "third"], **options)
            model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), seed)
            return kit_digits.train(model, x, y, steps=TUNING_STEPS, lr=lr, seed=seed)

        best, rate = kit_digits.search(tuned, TUNING_RATES, lambda model: kit_digits.accuracy(model, *data.validation))
        figures |= {f"digits_{kind}": kit_digits.accuracy(best, *data.test), f"digits_{kind}_rate": rate}
    return figures


@CLAIM.comparison
def planted(seed: int) -> dict[str, float]:
    """What is left of each planted change at each side's best rate; the digits."""
    base, figures = _conv(seed), dict[str, float]()
    for change in ("tucker", "matrix"):
        wanted = _planted(change, base, seed)
        for kind in ("flora", "lora"):
            found = {lr: _left(_tuned(kind, base, wanted, lr, seed), wanted) for lr in RATES}
            rate = min(RATES, key=found.__getitem__)
            figures |= {f"{change}_{kind}": found[rate], f"{change}_{kind}_rate": rate}
        S = torch.linalg.svdvals(wanted.flatten(1)).square()
        figures[f"{change}_svd"] = float(S[LORA_RANK:].sum() / S.sum())
    return figures | _digits(seed)


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""
    return [
        Check("planted Tucker change, share left by FLoRA", figures.median("tucker_flora"), "<=", 0.02),
        Check("planted Tucker change, share left by LoRA", figures.median("tucker_lora"), ">=", 0.2),
    ]
