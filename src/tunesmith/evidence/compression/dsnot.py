"""DSnoT: what a refined mask keeps, exactly; error of outputs and perplexity against Wanda's mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tunesmith.compression.dsnot import DSnoT, expected_loss
from tunesmith.core.compression import smallest
from tunesmith.core.modelmap import block_linears
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.models import embedded
from tunesmith.world.realtext import TextSplit, text_stream

ROWS, COLUMNS, TOKENS = 48, 96, 2000
SPARSITIES = (0.5, 0.7)
LENGTH, CALIBRATION, HELD_OUT = 128, 64, 64
THRESHOLD = 0.1 / 2048

CLAIM = Claim(
    "dsnot",
    says="Growing and pruning weights in pairs, without training, improves the mask that it starts from: at 70 % "
    "sparsity LLaMA-7B has a perplexity lower by 26.79 than with Wanda's mask.",
    where="abstract",
    ran="Random linear layers of 48 x 96 whose inputs have means of half a standard deviation: error of the outputs on "
    "held-out inputs, Wanda's mask against the same mask refined; for comparison, inputs of zero mean and the released "
    "code's setting without the sign rule, both without a threshold. Then tiny-lm-s pruned to 50 and 70 %, 64 "
    "calibration sequences of 128 tokens of the standard library's text: perplexity on 64 sequences of other modules, "
    "Wanda's masks in all layers against the same with the attention projections refined.",
    not_held="The perplexity of tiny-lm-s at 70 % is 1.9 % above Wanda's instead of below (at 50 %, 0.4 % below). "
    "Probably because DSnoT repairs what a mask does to the mean of an output, and the inputs of tiny-lm-s have hardly "
    "any: the median feature of an attention projection has a mean of 0.11 to 0.26 standard deviations, where the "
    "random layers have 0.5. With a mean of zero the random layers lose 3 to 4 % as well.",
)


def layer(seed: int, shift: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A random weight, statistics of 2000 inputs whose means are `shift` standard deviations, and 2000 others."""
    g = torch.Generator().manual_seed(seed)
    std = torch.rand(COLUMNS, generator=g) + 0.5
    mean = shift * std * torch.randn(COLUMNS, generator=g).sign()
    x = torch.randn(2 * TOKENS, COLUMNS, generator=g) * std + mean
    seen, held_out = x.split(TOKENS)
    found = {"input_mean": seen.mean(0), "input_variance": seen.var(0, unbiased=False)}
    found["input_square"] = (seen**2).sum(0)
    return torch.randn(ROWS, COLUMNS, generator=g), found, held_out


def wanda(W: Tensor, found: Mapping[str, Tensor], sparsity: float, group: tuple[int, int] | None = None) -> Tensor:
    """The mask that refining starts from."""
    return smallest(W.abs() * found["input_square"].sqrt(), sparsity, group, "layer")


def _refined(method: DSnoT, sparsity: float = 0.5) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(W, mean, mask before, mask after) of ten layers."""
    made = []
    for seed in range(10):
        W, found, _ = layer(seed, 0.5)
        start = wanda(W, found, sparsity, method.group)
        made.append((W, found["input_mean"], start, method.refined(W, start, found)[0]))
    return made


@CLAIM.exact
def rows_keep_their_number_of_weights() -> list[Check]:
    """Refining changes masks, but not how many weights of a row are kept."""
    pairs = [(start, end) for s in SPARSITIES for _, _, start, end in _refined(DSnoT(sparsity=s), s)]
    moved = sum(int((start.sum(1) != end.sum(1)).sum()) for start, end in pairs)
    swapped = sum(int((end & ~start).sum()) for start, end in pairs)
    return [Check("rows with another number", moved, "==", 0), Check("swaps", swapped, ">=", 100)]


@CLAIM.exact
def survivors_keep_their_dense_values() -> Check:
    """What is left in a pruned model is bit for bit what was there before."""
    model = _model()
    before = {name: model.get_submodule(name).weight.clone() for name in block_linears(model)}
    DSnoT(refine="all")(model, [{"input_ids": _windows("train", 4, 0)}])
    changed = 0
    for name, dense in before.items():
        now = model.get_submodule(name).weight
        changed += int((now[now != 0] != dense[now != 0]).sum())
    return Check("surviving weights that changed", changed, "==", 0)


@CLAIM.exact
def the_expected_loss_of_no_row_grows() -> list[Check]:
    """For every row, the expected loss of its output is at most what it was: |e after| <= |e before|."""
    checks = []
    for label, method in (("0.5", DSnoT(sparsity=0.5)), ("0.7", DSnoT(sparsity=0.7)), ("2:4", DSnoT(pattern="2:4"))):
        worst = max(
            float((expected_loss(W, end, mean).abs() - expected_loss(W, start, mean).abs()).max())
            for W, mean, start, end in _refined(method, method.sparsity)
        )
        checks.append(Check(f"largest growth at {label}", worst, "<=", 0.0))
    return checks


@CLAIM.exact
def a_pattern_stays() -> Check:
    """A 2:4 mask is a 2:4 mask afterwards."""
    broken = sum(int((end.unflatten(1, (-1, 4)).sum(-1) != 2).sum()) for *_, end in _refined(DSnoT(pattern="2:4")))
    return Check("groups of four that do not keep two", broken, "==", 0)


def _error(seed: int, shift: float, sparsity: float, method: DSnoT) -> dict[str, float]:
    W, found, x = layer(seed, shift)
    start = wanda(W, found, sparsity)
    end, _ = method.refined(W, start, found)
    error = {key: float(((x @ (W * mask).T) ** 2).mean()) for key, mask in (("wanda", start), ("dsnot", end))}
    lost = [float(expected_loss(W, mask, found["input_mean"]).abs().mean()) for mask in (start, end)]
    return {**error, "lost": lost[1] / lost[0]}


def _windows(split: TextSplit, rows: int, seed: int) -> Tensor:
    """Sequences of the standard library's text, (rows, 128)."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("tokenizer"))
    text = "".join(islice(text_stream(split, seed), rows))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: rows * LENGTH].view(rows, LENGTH)


def _model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.path("tiny-lm-s"), dtype=torch.float32)


@torch.no_grad()
def _perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(16)]
    return math.exp(sum(losses) / len(losses))


@CLAIM.comparison
def against_wanda(seed: int) -> dict[str, float]:
    """Errors of the outputs of a layer, and perplexities of a pruned model."""
    figures: dict[str, float] = {}
    for sparsity in SPARSITIES:
        for label, shift, method in (
            ("", 0.5, DSnoT()),
            (", zero mean", 0.0, DSnoT()),
            (", without the sign rule", 0.5, DSnoT(sign_stop=False)),
        ):
            found = _error(seed, shift, sparsity, method)
            figures[f"error of Wanda at {sparsity}{label}"] = found["wanda"]
            figures[f"error of DSnoT at {sparsity}{label}"] = found["dsnot"]
            figures[f"expected loss left at {sparsity}{label}"] = found["lost"]
    calibration = [{"input_ids": ids} for ids in _windows("train", CALIBRATION, seed).split(8)]
    held_out = _windows("heldout", HELD_OUT, seed)
    figures["perplexity of the dense model"] = _perplexity(_model(), held_out)
    for sparsity in SPARSITIES:
        for label, threshold in (("Wanda", math.inf), ("DSnoT", THRESHOLD)):
            model = _model()
            DSnoT(sparsity=sparsity, threshold=threshold)(model, calibration)
            figures[f"perplexity of {label} at {sparsity}"] = _perplexity(model, held_out)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """Better than Wanda wherever features have means, in every seed; perplexity by the median."""
    checks = []
    for s in SPARSITIES:
        ratios = [
            a / b for a, b in zip(figures[f"error of DSnoT at {s}"], figures[f"error of Wanda at {s}"], strict=True)
        ]
        checks.append(Check(f"error of DSnoT / Wanda at {s}, largest over the seeds", max(ratios), "<=", 1.0))
        left = max(figures[f"expected loss left at {s}"])
        checks.append(Check(f"expected loss left at {s}, largest over the seeds", left, "<=", 0.5))
    s = SPARSITIES[-1]
    ratio = figures.median(f"perplexity of DSnoT at {s}") / figures.median(f"perplexity of Wanda at {s}")
    return [*checks, Check(f"perplexity of DSnoT / Wanda at {s}", ratio, "<=", 1.0)]
