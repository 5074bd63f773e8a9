"""Fine-tuning an embedded language model on a family of the world, and its loss on held-out items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_linear_schedule_with_warmup

from tunesmith.models import embedded
from tunesmith.world import Family, Item

Batch = dict[str, Tensor]


def language_model(name: str = "tiny-lm-s") -> PreTrainedModel:
    """An embedded model in float32."""
    return AutoModelForCausalLM.from_pretrained(embedded.path(name), dtype=torch.float32)


def batches(items: Sequence[Item], rows: int, name: str = "tiny-lm-s") -> list[Batch]:
    """The items in their order, `rows` to a batch, padded on the right; labels on the answer and its end alone."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path(name))
    return [_batch(tokenizer, items[start : start + rows]) for start in range(0, len(items), rows)]


def _batch(tokenizer: Any, items: Sequence[Item]) -> Batch:
    prompts = [tokenizer(item.prompt, add_special_tokens=False)["input_ids"] for item in items]
    answers = [tokenizer(item.answer, add_special_tokens=False)["input_ids"] for item in items]
    rows = [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
    longest = max(len(p) + len(a) for p, a in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train_batches(family: Family, steps: int, rows: int, seed: int) -> list[Batch]:
    """One batch per step, every item new."""
    return batches(family.items(steps * rows, split="train", seed=seed), rows)


def heldout_batches(family: Family, count: int) -> tuple[list[Batch], list[Batch]]:
    """`count` held-out items to choose a learning rate by, and `count` others to report."""
    items = family.items(2 * count, split="heldout", seed=0)
    return batches(items[:count], 64), batches(items[count:], 64)


def tune(model: nn.Module, optimizer: torch.optim.Optimizer, given: Sequence[Batch]) -> None:
    """One step per batch, with a linear schedule whose first tenth warms up."""
    scheduler = get_linear_schedule_with_warmup(optimizer, len(given) // 10, len(given))
    model.train()
    for batch in given:
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, given: Sequence[Batch]) -> float:
    """Mean cross-entropy over all labelled tokens, nats; infinite where training diverged."""
    model.eval()
    counts = [int((batch["labels"] != -100).sum()) for batch in given]
    total = sum(float(model(**batch).loss) * n for batch, n in zip(given, counts, strict=True))
    mean = total / sum(counts)
    return mean if mean == mean else float("inf")
