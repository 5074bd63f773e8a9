"""The embedded masked language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.models.pretrain import card, loop
from tunesmith.models.pretrain.mixture import Mixture, library
from tunesmith.models.pretrain.tokenizer import load

BATCH = {"rows": 12, "length": 128, "text_rows": 10, "text_length": 256}
PLAN = loop.Plan("tiny-encoder", steps=4000, lr=2e-3, seed=13, batch=BATCH)
MASKED = 0.3
WINDOWS = 100
SUMMARY = (
    "A small BERT, trained to fill in masked tokens of items of `tunesmith.world` and of source text of the Python "
    "standard library. Its tokenizer is that of the language models, but pads on the right, since the positions are "
    "absolute. Nothing is put before or after a text."
)


def build(tokenizer: PreTrainedTokenizerBase, seed: int) -> BertForMaskedLM:
    """An untrained model."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = loop.seeded(lambda: BertForMaskedLM(config), seed)
    assert isinstance(model, BertForMaskedLM)
    return model


def corrupt(
    ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's corruption (Devlin et al. 2019, section 3.1): of what is chosen 80 % masked, 10 % random, 10 % kept.

    Twice BERT's 15 % are chosen: a step teaches twice as much, and small models learn better so (Wettig et al. 2023).

    Args:
        ids: (rows, length) tokens; padding is never chosen.

    Returns:
        (corrupted ids, chosen), the latter bool of the same shape.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids != tokenizer.pad_token_id)
    fate = torch.rand(ids.shape, generator=generator)
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    corrupted = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (fate >= 0.9), other, corrupted), chosen


def loss(model: BertForMaskedLM, mixture: Mixture, step: int) -> tuple[torch.Tensor, int]:
    """(mean loss on the chosen tokens, tokens) of packed documents and windows of text."""
    generator = torch.Generator().manual_seed(mixture.seed * 1_000_003 + step)
    packed = mixture.packed(step, BATCH["rows"], BATCH["length"])
    text = mixture.text(step, BATCH["text_rows"], BATCH["text_length"])
    same = packed.segment[:, None, :, None] == packed.segment[:, None, None, :]
    total, count = torch.tensor(0.0), 0
    for ids, extra in (
        (packed.ids, {"attention_mask": same, "position_ids": packed.position}),
        (text, {}),
    ):
        corrupted, chosen = corrupt(ids, mixture.tokenizer, generator)
        hidden = model.bert(input_ids=corrupted, **extra).last_hidden_state
        total = total + F.cross_entropy(model.cls(hidden[chosen]).float(), ids[chosen], reduction="sum")
        count += int(chosen.sum())
    return total / count, int((packed.segment > 0).sum()) + text.numel()


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> card.Figures:
    """Accuracy on masked tokens of the held-out modules, and of always saying the commonest training token."""
    text = library(tokenizer, "heldout")
    length = BATCH["text_length"]
    starts = torch.linspace(0, len(text) - length, WINDOWS).long()
    ids = torch.stack([text[start : start + length] for start in starts.tolist()])
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < MASKED
    model.eval()
    said = model(input_ids=torch.where(masked, tokenizer.mask_token_id, ids)).logits.argmax(-1)
    commonest = library(tokenizer, "pretrain").bincount(minlength=len(tokenizer)).argmax()
    return {
        "masked_tokens": int(masked.sum()),
        "masked_accuracy": round((said == ids)[masked].float().mean().item(), 4),
        "unigram_accuracy": round((ids[masked] == commonest).float().mean().item(), 4),
    }


def render(figures: card.Figures) -> str:
    """The figures of `measure` in Markdown."""
    return (
        f"Of {figures['masked_tokens']} masked tokens in held-out modules of the Python standard library, "
        f"{figures['masked_accuracy']:.1%} are filled in correctly; always saying the commonest token of the training "
        f"text gets {figures['unigram_accuracy']:.1%}."
    )


def make(plan: loop.Plan, output: Path, checkpoints: Path, *, resume: bool, compiled: bool) -> None:
    """Train, measure and write the model."""
    tokenizer = load()
    tokenizer.padding_side = "right"
    mixture = Mixture(tokenizer, plan.seed)
    model = build(tokenizer, plan.seed)
    trained = build(tokenizer, plan.seed)
    if compiled:
        model.bert.compile()
    spent = loop.train(model, plan, lambda step: loss(model, mixture, step), checkpoints=checkpoints, resume=resume)
    trained.load_state_dict(model.state_dict())
    card.publish(
        trained,
        tokenizer,
        output,
        measure=lambda saved: measure(saved, tokenizer),
        render=render,
        plan=plan,
        spent=spent,
        summary=SUMMARY,
        task="fill-mask",
        auto="AutoModelForMaskedLM",
    )
