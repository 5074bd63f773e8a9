"""What is measured on an embedded language model: exact match by greedy generation, and perplexity on real text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.models.pretrain.mixture import library
from tunesmith.world.base import Family, Item

Form = Literal["plain", "chat"]
FORMS: tuple[Form, ...] = ("plain", "chat")


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    form: Form,
    *,
    batch: int = 100,
    longest: int = 48,
) -> list[str]:
    """The model's greedy answer to each item, at most `longest` tokens of it."""
    prompts = [item.prompt for item in items]
    if form == "chat":
        turns = [item.messages()[:1] for item in items]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    model.eval()
    said: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
        said += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    n: int,
    form: Form,
    *,
    seed: int = 0,
) -> float:
    """The share of `n` held-out items that the model answers correctly, 0 to 1."""
    items = family.items(n, split="heldout", seed=seed)
    said = answers(model, tokenizer, items, form)
    return sum(family.check(item, output) for item, output in zip(items, said, strict=True)) / n


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, windows: int = 64, length: int = 512
) -> float:
    """Per-token perplexity on evenly spaced windows of the held-out standard-library modules."""
    text = library(tokenizer, "heldout")
    starts = torch.linspace(0, len(text) - length, windows).long()
    model.eval()
    total = 0.0
    for start in starts.tolist():
        ids = text[start : start + length][None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return math.exp(total / (windows * (length - 1)))
