"""Proxy-tuning: identities of the formula under `generate`, and how much of the tuning gap a small pair closes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from tunesmith.core.sidemodel import SideModel
from tunesmith.decoding.proxy_tuning import ProxyTuning
from tunesmith.evidence import kit_chains
from tunesmith.evidence.claim import Check, Claim, Figures

LARGE, SMALL = 64, 32
PRETRAIN, TUNE = 400, 150
PRETRAIN_RATE = 3e-3
RATES = (1e-2, 3e-2, 1e-1)
LENGTH, PAD = 32, 0
STYLES: tuple[dict, ...] = ({}, {"do_sample": True}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9})

CLAIM = Claim(
    "proxy-tuning",
    says="Steering Llama2-70B by what tuning changed in a 7B model closes 88 % of the gap to the tuned 70B.",
    where="abstract",
    ran="Identities on random GPT-2 models, greedy and sampling with the same seed, prompts of unequal lengths. Then "
    "GPT-2 of width 64 and 32, pretrained on one Markov chain of 64 states; the task is the half-and-half mixture of "
    "it with another chain. The small model and, for comparison, the large one are tuned on the task, 150 steps, each "
    "with three learning rates, chosen on held-out sequences; the loss on other held-out sequences is that of the "
    "large model, of the large model steered by the small pair, and of the directly tuned large one.",
)


def _random(width: int, seed: int) -> GPT2LMHeadModel:
    return kit_chains.model(width, seed, initializer_range=0.2)


def _prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 8, 3 and 5 tokens, padded on the left."""
    ids = torch.randint(1, kit_chains.STATES, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) >= (8 - torch.tensor([8, 3, 5]))[:, None]
    return ids.masked_fill(~mask, PAD), mask.long()


def _sides(expert: GPT2LMHeadModel, anti: GPT2LMHeadModel) -> dict[str, SideModel]:
    return {"expert": SideModel(expert, pad_token_id=PAD), "anti_expert": SideModel(anti, pad_token_id=PAD)}


def _generate(model: GPT2LMHeadModel, style: dict, method: ProxyTuning | None = None) -> Tensor:
    ids, mask = _prompts()
    torch.manual_seed(7)
    processors = None if method is None else [method]
    size = {"max_new_tokens": 24, "pad_token_id": PAD}
    return model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **size, **style)


def _differing(pairs: Iterator[tuple[Tensor, Tensor]]) -> int:
    return sum(int((a != b).any(1).sum()) for a, b in pairs)


@CLAIM.exact
def alpha_zero_is_the_large_model() -> Check:
    """With alpha = 0 the token ids are those of the large model alone."""
    large, expert, anti = _random(LARGE, 0), _random(SMALL, 1), _random(SMALL, 2)
    pairs = (
        (_generate(large, style, ProxyTuning(_sides(expert, anti), alpha=0.0)), _generate(large, style))
        for style in STYLES
    )
    return Check("sequences that differ, of 9", _differing(pairs), "==", 0)


@CLAIM.exact
def an_unchanged_pair_changes_nothing() -> Check:
    """With expert = anti-expert the token ids are those of the large model alone."""
    large, small = _random(LARGE, 0), _random(SMALL, 1)
    pairs = ((_generate(large, style, ProxyTuning(_sides(small, small))), _generate(large, style)) for style in STYLES)
    return Check("sequences that differ, of 9", _differing(pairs), "==", 0)


@CLAIM.exact
def large_as_anti_expert_is_the_expert() -> Check:
    """With the large model as anti-expert the token ids are those of the expert alone."""
    large, expert = _random(LARGE, 0), _random(SMALL, 1)
    pairs = (
        (_generate(large, style, ProxyTuning(_sides(expert, large))), _generate(expert, style)) for style in STYLES
    )
    return Check("sequences that differ, of 9", _differing(pairs), "==", 0)


@CLAIM.exact
def cached_equals_uncached() -> list[Check]:
    """Helpers with caches give what full passes over every prefix give, at one token per step and row."""
    large, expert, anti = _random(LARGE, 0), _random(SMALL, 1), _random(SMALL, 2)
    cached = ProxyTuning(_sides(expert, anti))
    ids = _generate(large, {"do_sample": True}, cached)
    mask = F.pad(_prompts()[1], (0, ids.shape[1] - 8), value=1)
    worst = 0.0
    sides = _sides(expert, anti)
    for length in range(8, ids.shape[1]):
        fresh = _sides(expert, anti)
        for role, side in sides.items():
            difference = side.logits(ids[:, :length]) - fresh[role].logits(ids[:, :length])
            worst = max(worst, float(difference.abs().max()))
    expected = int(mask[:, :-1].sum())
    return [
        Check("largest difference of a helper's logits", worst, "<=", 1e-5),
        Check("tokens through each helper - tokens to read", cached.helpers["expert"].tokens - expected, "==", 0),
    ]


@torch.no_grad()
def _steered_loss(large: GPT2LMHeadModel, method: ProxyTuning, ids: Tensor) -> float:
    """The loss of the law from which `generate` samples, at every position of given sequences."""
    scores = large(input_ids=ids).logits
    laws = [method(ids[:, : t + 1], scores[:, t]).log_softmax(-1) for t in range(ids.shape[1] - 1)]
    return float(F.nll_loss(torch.stack(laws, dim=1).flatten(0, 1), ids[:, 1:].flatten()))


@CLAIM.comparison
def closing_the_gap(seed: int) -> dict[str, float]:
    base = kit_chains.chain(10 * seed)
    task = (base + kit_chains.chain(10 * seed + 1)) / 2
    choose, report = (kit_chains.sample(task, 256, LENGTH, 10 * seed + i) for i in (2, 3))
    figures: dict[str, float] = {"chain itself": kit_chains.best_loss(task, report)}
    models = {}
    for name, width in (("large", LARGE), ("small", SMALL)):
        untuned = kit_chains.model(width, 10 * seed + 4)
        kit_chains.train(untuned, base, steps=PRETRAIN, lr=PRETRAIN_RATE, seed=10 * seed + 5, length=LENGTH)
        runs = []
        for lr in RATES:
            tuned = kit_chains.train(copy.deepcopy(untuned), task, steps=TUNE, lr=lr, seed=10 * seed + 6, length=LENGTH)
            runs.append((kit_chains.loss(tuned, choose), lr, tuned))
        _, figures[f"{name} tuned, lr"], tuned = min(runs, key=lambda run: run[0])
        models[name] = (untuned, tuned)
        figures[name] = kit_chains.loss(untuned, report)
        figures[f"{name} tuned"] = kit_chains.loss(tuned, report)
    anti, expert = models["small"]
    method = ProxyTuning({"expert": SideModel(expert), "anti_expert": SideModel(anti)})
    figures["large steered"] = _steered_loss(models["large"][0], method, report)
    gap = figures["large"] - figures["large tuned"]
    figures["gap closed, %"] = 100 * (figures["large"] - figures["large steered"]) / gap
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    return [
        Check(
            "gap between the large model and the tuned large model closed, %", figures.median("gap closed, %"), ">=", 50
        )
    ]
