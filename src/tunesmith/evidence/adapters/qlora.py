"""QLoRA: the storage, its values and gradients, exactly; the loss of tuning on it against tuning on plain weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith import world
from tunesmith.core import layer as layers
from tunesmith.core.seeds import generator
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.evidence import kit_digits, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.models import embedded
from tunesmith.models.loader import load_base

STEPS, ROWS, RATES, RANK = 60, 8, (3e-4, 1e-3, 3e-3), 8
BLOCK, OUTER = 64, 256

CLAIM = Claim(
    "qlora",
    says="Four-bit NormalFloat with double quantisation and LoRA on all linear layers matches 16-bit fine-tuning: a "
    "65B model on one 48 GB GPU, 99.3 % of ChatGPT's level on Vicuna.",
    where="abstract; sections 3 and 4",
    ran="The sixteen levels, the dequantised weights and the bits per weight against section 3 computed here, and "
    "gradients against a float layer of the dequantised weights. The error on normal weights of NF4, of 4-bit integers "
    "with an absolute maximum per block, and of bitsandbytes' FP4. Then tiny-lm-s learns to rotate lists (`rotate` of "
    "the world), 60 steps of 8 rows: LoRA of rank 8 on all linear layers, on the plain base and on the NF4 base, three "
    "learning rates each, chosen on held-out items, reported on others.",
)


def levels() -> Tensor:
    """NF4's sixteen values: quantiles of N(0, 1) with 8 non-negative and 8 non-positive of them sharing the zero."""
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    return (found / found.max()).float()


def rounded(W: Tensor, codes: Tensor) -> Tensor:
    """W with each block of 64 at the nearest codes times its absolute maximum."""
    blocks = W.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale.clamp_min(1e-30) - codes[:, None, None]).abs().argmin(0)
    return (codes[nearest] * scale).reshape(W.shape)


def stored(W: Tensor, kind: str = "nf4", double: bool = False) -> tuple[Any, Tensor]:
    """bitsandbytes' layer of a weight, and the weight that it computes with."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        W.shape[1], W.shape[0], bias=False, quant_type=kind, compress_statistics=double, compute_dtype=torch.float32
    )
    made.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type=kind, compress_statistics=double)
    made = made.to("cpu")
    layers.keep_codes_readable(made)
    return made, layers.read_weight(made, layers.describe(made, "layer"))


def _weight(rows: int = 256, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=generator(0, "weight"))


@CLAIM.exact
def the_type_is_the_papers() -> list[Check]:
    """bitsandbytes' codes and dequantised weights are those of section 3, computed here."""
    import bitsandbytes.functional as bnb

    ours = levels()
    theirs = bnb.get_4bit_type("nf4", device="cpu").float().sort().values
    W = _weight()
    return [
        Check("largest difference of a level", float((ours - theirs).abs().max()), "<=", 1e-6),
        Check("largest difference of a weight", float((rounded(W, ours) - stored(W)[1]).abs().max()), "<=", 1e-6),
    ]


@CLAIM.exact
def bits_per_weight() -> list[Check]:
    """Codes, 8-bit constants and their 32-bit scales: 4 + 8/64 + 32/(64 x 256), counted in what is stored."""
    found = {}
    for double in (False, True):
        made, _ = stored(_weight(1024, 1024), double=double)
        state = made.weight.quant_state
        held = [made.weight.data, state.absmax]
        if state.nested:
            held += [state.state2.absmax]
        found[double] = 8 * sum(t.numel() * t.element_size() for t in held) / 1024**2
    return [
        Check("|bits - 4.127| with double quantisation", abs(found[True] - 4.127), "<=", 0.01),
        Check("|bits - 4.5| without", abs(found[False] - 4.5), "<=", 0.01),
    ]


@CLAIM.exact
def normal_weights_are_what_it_is_for() -> list[Check]:
    """Mean squared error on N(0, 1), blocks of 64: NF4 below 4-bit integers with an absolute maximum, below FP4."""
    W = _weight(1024, 1024)
    integers = torch.arange(-7, 8) / 7.0
    errors = {
        "NF4": float((rounded(W, levels()) - W).square().mean()),
        "INT4": float((rounded(W, integers) - W).square().mean()),
        "FP4": float((stored(W, "fp4")[1] - W).square().mean()),
    }
    return [
        Check("NF4 / INT4", errors["NF4"] / errors["INT4"], "<=", 0.9),
        Check("INT4 / FP4", errors["INT4"] / errors["FP4"], "<=", 0.9),
    ]


@CLAIM.exact
def gradients_are_those_of_the_dequantised_layer() -> list[Check]:
    """A, B and x get the gradients of a float layer that holds the dequantised weight; codes stay bit-equal."""
    made, W = stored(_weight(64, 128), double=True)
    plain = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        plain.weight.copy_(W)
    before = made.weight.data.clone()
    found = []
    for base in (made, plain):
        config = tunesmith.adapter("qlora", rank=RANK, target_modules=["0"])
        model = kit_digits.seeded(lambda base=base, config=config: get_peft_model(nn.Sequential(base), config), 0)
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, TunesmithLayer)):
                layer.active()[0].B.copy_(torch.randn(64, RANK, generator=generator(0, "B")))
        x = torch.randn(5, 128, generator=generator(0, "x")).requires_grad_()
        model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]
    return [
        Check("largest relative difference of a gradient", max(apart), "<=", 1e-5),
        Check("codes that changed", int((made.weight.data != before).sum()), "==", 0),
    ]


@CLAIM.exact
def merged_into_the_dequantised_base() -> Check:
    """Folded into the dequantised weights, the model is the adapter on the quantised one."""
    ids = torch.randint(3, 500, (2, 12), generator=generator(0, "ids"))
    results = []
    for dequantise in (False, True):
        base: Any = load_base(str(embedded.path("tiny-lm-s")), "causal-lm", quantization="nf4")
        base = base.dequantize() if dequantise else base
        config = tunesmith.adapter("qlora", rank=RANK)
        model = kit_digits.seeded(lambda base=base, config=config: get_peft_model(base, config), 0)
        g = generator(0, "moved")
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
            model = model.merge_and_unload() if dequantise else model
            results.append(model.eval()(input_ids=ids).logits)
    unmerged, merged = results
    apart = float((merged - unmerged).abs().max() / unmerged.abs().max())
    return Check("largest relative difference of a logit", apart, "<=", 1e-5)


@CLAIM.comparison
def rotate(seed: int) -> dict[str, float]:
    """Cross-entropy on held-out items, on both bases, at the best of three rates."""
    task = world.get("rotate")
    given = kit_tune.train_batches(task, STEPS, ROWS, seed)
    choose, report = kit_tune.heldout_batches(task, 128)
    figures: dict[str, float] = {}
    for side, kind in (("plain", "none"), ("nf4", "nf4")):
        base = load_base(str(embedded.path("tiny-lm-s")), "causal-lm", quantization=kind)  # type: ignore[arg-type]
        figures[f"{side}_before"] = kit_tune.loss(base, report)
        best = float("inf")
        for lr in RATES:
            config = tunesmith.adapter("qlora", rank=RANK)
            model = kit_digits.seeded(
                lambda base=base, config=config: get_peft_model(copy.deepcopy(base), config), seed
            )
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
            kit_tune.tune(model, optimizer, given)
            chosen = kit_tune.loss(model, choose)
            if chosen < best:
                best, figures[f"{side}_rate"] = chosen, lr
                figures[side] = kit_tune.loss(model, report)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold."""
    return [Check("cross-entropy, QLoRA / LoRA", figures.median("nf4") / figures.median("plain"), "<=", 1.02)]
