"""WeLore: threshold, factors and counts exactly; adaptive against uniform ranks, and tuning the factors alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer

import tunesmith
from tunesmith import world
from tunesmith.adapters.welore import WeLore, normalised, threshold_for
from tunesmith.core.meters import flops, grad_bytes, state_bytes
from tunesmith.core.modelmap import block_linears
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.models import embedded
from tunesmith.world.realtext import text_stream

TASK, STEPS, ROWS, RATES = "rotate", 80, 16, (1e-3, 3e-3, 1e-2)
LOW = ("q_proj", "up_proj", "down_proj")
LENGTH = 64

CLAIM = Claim(
    "welore",
    says="Singular values of all layers under one threshold give each layer its rank. Half of LLaMA-2-7B's left out, "
    "tuning the layers that compress well, and them alone, can outperform full fine-tuning, with about 3 times the "
    "throughput and 0.6 times the GPU memory.",
    where="abstract; sections 3 and 4",
    ran="Threshold, factors, bytes and FLOPs counted on tiny-lm-s, an embedded language model of a million weights. "
    "Then its perplexity on the source text of the Python library after adaptive ranks (min_ratio 0) and after ranks "
    "of the same share of every layer, at equal total rank, 30 and 50 % left out: as it is, and with the query, up and "
    "down projections of every other block cut to rank 16 with 1 % of noise, so that its matrices differ in decay. "
    "Last, tiny-lm-s at ratio 0.5 learns the task `rotate` in 80 AdamW steps of 16 items: the factors alone, and all "
    "numbers of the blocks of the same compressed model; three learning rates each, chosen on 128 unseen items.",
    not_held="Tuning the factors alone, 21 % of the numbers, reached what tuning everything did in one seed of three: "
    "0.69, 0.27 and 0.17 nats against 0.21, 0.15 and 0.64 (7.27 before), both at the rate 3e-3. After 80 steps single "
    "runs of either side still differ by a factor of four, more than the sides do. The paper tunes a model of 7 "
    "billion weights for longer, on data like that of its pretraining; `rotate` is a new task for a small one, to "
    "which the layers that compress badly, frozen here, may have more to give. Adaptive ranks held throughout.",
)


def _welore(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), tunesmith.adapter("welore", **options)).eval()


def _held(model: nn.Module) -> dict[str, WeLore]:
    return {m.layer.name: m for m in model.modules() if isinstance(m, WeLore)}


def _weights(base: nn.Module) -> dict[str, Tensor]:
    return {name: base.get_submodule(name).weight.detach() for name in block_linears(base)}


@CLAIM.exact
@torch.no_grad()
def the_threshold_is_where_a_bisection_ends() -> list[Check]:
    """Singular values left out / all of them is the ratio, and a bisection leaves out the same."""
    base = kit_tune.language_model()
    values = {name: normalised(torch.linalg.svdvals(W)) for name, W in _weights(base).items()}
    every = torch.cat(list(values.values()))
    most, other = 0.0, 0
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        k, low, high = threshold_for(values, ratio), 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if int((every < middle).sum()) >= ratio * len(every) - 0.5 else (middle, high)
        most = max(most, abs(int((every < k).sum()) - ratio * len(every)))
        other += sum(int((v < k).sum()) != int((v < high).sum()) for v in values.values())
    found = _held(_welore(base, ratio=0.5, min_ratio=0.0))
    k = threshold_for(values, 0.5)
    wrong = sum((made.rank or min(made.layer.shape)) != int((values[n] >= k).sum()) for n, made in found.items())
    return [
        Check("singular values left out - ratio x all, largest of 7 ratios", most, "<=", 1),
        Check("layers of which a bisection leaves out another number", other, "==", 0),
        Check("layers whose rank is not what the threshold keeps", wrong, "==", 0),
    ]


@CLAIM.exact
@torch.no_grad()
def factors_are_the_best_approximation() -> list[Check]:
    """U V is the best approximation of its rank of every compressed layer."""
    base = kit_tune.language_model()
    apart, excess = 0.0, 0.0
    found = {name: made for name, made in _held(_welore(base, min_ratio=0.0)).items() if made.rank}
    for name, W in _weights(base).items():
        if name in found:
            product, r = found[name].weight(W).double(), found[name].rank
            U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            apart = max(apart, float((product - (U[:, :r] * S[:r]) @ Vh[:r]).abs().max() / S[0]))
            least = S[r:].square().sum().sqrt()
            excess = max(excess, abs(float(torch.dist(product, W.double()) / least) - 1))
    return [
        Check("largest entry of U V - W_r, of the largest singular value", apart, "<=", 1e-5),
        Check("|W - U V| / the least possible - 1", excess, "<=", 1e-5),
    ]


@CLAIM.exact
def decaying_layers_become_factors() -> list[Check]:
    """24 planted layers: the 12 whose singular values fall as 0.9^i become factors, the 12 random ones do not."""
    layers = [nn.Linear(64, (64, 96)[i % 2]) for i in range(24)]
    for i, layer in enumerate(layers):
        drawn = torch.randn(layer.weight.shape, generator=generator(i, "planted"))
        U, _, Vh = torch.linalg.svd(drawn, full_matrices=False)
        layer.weight.data = U * 0.9 ** torch.arange(64) @ Vh if i < 12 else drawn
    found = _held(_welore(nn.ModuleDict({"blocks": nn.ModuleList(layers), "head": nn.Linear(2, 2)})))
    factors = {int(name.rpartition(".")[2]) for name, made in found.items() if made.rank}
    return [
        Check("decaying layers in factors", len(factors & set(range(12))), "==", 12),
        Check("random layers in factors", len(factors - set(range(12))), "==", 0),
    ]


def _trained_numbers(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _unfrozen(model: Any) -> Any:
    """The same compressed model with all numbers of its blocks training, but the weights that factors replaced."""
    replaced = {name for name, made in _held(model).items() if made.rank}
    for name, p in model.base_model.model.named_parameters():
        if name.startswith("model.layers.") and name.partition(".base_layer")[0] not in replaced:
            p.requires_grad_(True)
    return model


@CLAIM.exact
def costs_are_those_of_the_factors() -> list[Check]:
    """Bytes and FLOPs of a step on tiny-lm-s at ratio 0.5, and what a rank costs a square layer."""
    base, batch = kit_tune.language_model(), kit_tune.train_batches(world.get(TASK), 1, ROWS, 0)[0]
    model = _welore(base).train()
    factors = [made for made in _held(model).values() if made.rank]
    numbers = sum(made.rank * sum(made.layer.shape) for made in factors)
    dense = sum(made.layer.shape[0] * made.layer.shape[1] for made in factors)
    optimizer = torch.optim.AdamW(_trained_numbers(model))
    with grad_bytes(model) as peak:
        model(**batch).loss.backward()
    optimizer.step()
    counters = 4 * len(_trained_numbers(model))
    with torch.no_grad():
        saved = flops(lambda: base(**batch)) - flops(lambda: model(**batch))
    full = copy.deepcopy(base).requires_grad_(True)
    share = flops(lambda: model(**batch).loss.backward()) / flops(lambda: full(**batch).loss.backward())
    square = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(100, 100, bias=False)])})
    at_60 = next(iter(_held(_welore(square, rank=60)).values()))
    return [
        Check("optimizer state / (8 sum r (m + n))", (state_bytes(optimizer) - counters) / (8 * numbers), "==", 1),
        Check("gradients / (4 sum r (m + n))", peak.bytes / (4 * numbers), "==", 1),
        Check("numbers of the layers in factors, after / before", numbers / dense, "<=", 1),
        Check(
            "FLOPs saved in a forward pass / (2 sum (m n - r (m + n)) per token)",
            saved / (2 * batch["input_ids"].numel() * (dense - numbers)),
            "==",
            1,
        ),
        Check("FLOPs of a step / those of full fine-tuning of the dense model", share, "<=", 1),
        Check(
            "numbers of a square layer without 40 % of its singular values", at_60.trainable_count() / 1e4, "==", 1.2
        ),
    ]


@lru_cache
def _text() -> Tensor:
    """Tokens of the held-out modules of the library."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("tiny-lm-s"))
    text = "".join(text_stream("heldout"))[:200_000]
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def _windows(seed: int) -> list[kit_tune.Batch]:
    text = _text()
    starts = torch.randint(len(text) - LENGTH, (128, 1), generator=generator(seed, "windows"))
    ids = text[starts + torch.arange(LENGTH)]
    return [{"input_ids": rows, "labels": rows} for rows in ids.split(64)]


@torch.no_grad()
def _with_decay(base: nn.Module, seed: int) -> nn.Module:
    """Matrices of every other block cut to rank 16, with noise of 1 % of their norm."""
    changed = copy.deepcopy(base)
    for name, W in _weights(changed).items():
        if name.endswith(LOW) and int(name.split(".")[2]) % 2:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            noise = torch.randn(W.shape, generator=generator(seed, name))
            low = (U[:, :16] * S[:16]) @ Vh[:16]
            W.copy_(low + 0.01 * low.norm() * noise / noise.norm())
    return changed


def _uniform(shapes: Mapping[str, Sequence[int]], total: int) -> dict[str, int]:
    """The same share of every layer's smaller side, `total` in all."""
    sides = {name: min(shape) for name, shape in shapes.items()}
    share = total / sum(sides.values())
    ranks = {name: int(share * side) for name, side in sides.items()}
    for name in list(ranks)[: total - sum(ranks.values())]:
        ranks[name] += 1
    return ranks


@CLAIM.comparison
def ranks_and_tuning(seed: int) -> dict[str, float]:
    """Perplexities after adaptive and uniform ranks; the held-out loss of each way to tune at its best rate."""
    base, figures = kit_tune.language_model(), {}
    text = _windows(seed)
    for kind, model in (("", base), ("planted ", _with_decay(base, seed))):
        figures[f"{kind}dense"] = float(torch.tensor(kit_tune.loss(model, text)).exp())
        for ratio in (0.3, 0.5):
            ours = _welore(model, ratio=ratio, min_ratio=0.0)
            shapes = {name: made.layer.shape for name, made in _held(ours).items()}
            total = sum(made.rank or min(made.layer.shape) for made in _held(ours).values())
            theirs = _welore(model, ranks=_uniform(shapes, total))
            for side, made in (("adaptive", ours), ("uniform", theirs)):
                figures[f"{kind}{side} {ratio}"] = float(torch.tensor(kit_tune.loss(made, text)).exp())
    choose, report = kit_tune.heldout_batches(world.get(TASK), 128)
    start = _welore(base)
    figures["before"] = kit_tune.loss(start, report)

    def tuned(lr: float, everything: bool) -> nn.Module:
        model = copy.deepcopy(start)
        if everything:
            _unfrozen(model)
        optimizer = torch.optim.AdamW(_trained_numbers(model), lr=lr, weight_decay=0.0)
        kit_tune.tune(model, optimizer, kit_tune.train_batches(world.get(TASK), STEPS, ROWS, seed))
        return model

    for side, everything in (("factors", False), ("everything", True)):
        model, figures[f"{side} rate"] = kit_digits.search(
            lambda lr, everything=everything: tuned(lr, everything), RATES, lambda m: -kit_tune.loss(m, choose)
        )
        figures[side] = kit_tune.loss(model, report)
        figures[f"{side} numbers"] = sum(p.numel() for p in _trained_numbers(model))
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's: adaptive ranks are better where matrices differ in decay. The paper's: tuning factors is enough."""

    def ratio(kind: str, share: float) -> float:
        return figures.median(f"{kind}adaptive {share}") / figures.median(f"{kind}uniform {share}")

    return [
        Check("perplexity, adaptive / uniform, planted decay, 30 % left out", ratio("planted ", 0.3), "<=", 0.999),
        Check("perplexity, adaptive / uniform, planted decay, 50 % left out", ratio("planted ", 0.5), "<=", 0.999),
        Check("perplexity, adaptive / uniform, tiny-lm-s, 30 % left out", ratio("", 0.3), "<=", 0.999),
        Check("perplexity, adaptive / uniform, tiny-lm-s, 50 % left out", ratio("", 0.5), "<=", 0.999),
        Check("loss, factors / everything", figures.median("factors") / figures.median("everything"), "<=", 1),
    ]
