"""The embedded causal language models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith import world
from tunesmith.models.pretrain import card, loop
from tunesmith.models.pretrain.evaluate import FORMS, exact_match, perplexity
from tunesmith.models.pretrain.mixture import Mixture, Packed
from tunesmith.models.pretrain.tokenizer import LONGEST, load

SHAPES: dict[str, dict[str, int]] = {
    "tiny-lm-m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "head_dim": 64},
    "tiny-lm-s": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "head_dim": 32},
}
BATCH = {"rows": 13, "length": 256, "text_rows": 1, "text_length": 768}
PLANS = {
    "tiny-lm-m": loop.Plan(
        "tiny-lm-m", steps=4000, lr=1.5e-3, seed=11, batch=BATCH, warmup=200, horizon=6000, cooldown=500
    ),
    "tiny-lm-s": loop.Plan("tiny-lm-s", steps=2500, lr=3e-3, seed=12, batch=BATCH, warmup=200),
}
MEASURED_ITEMS = 300
SUMMARY = (
    "A small Llama (grouped-query attention, tied embeddings) that was shown seven families of synthetic tasks "
    "(`tunesmith.world`), in plain and in chat form, and source text of the Python standard library. Prompts are at "
    "most 768 tokens in training."
)


def build(name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained model: tied embeddings, grouped-query attention with 4 query and 2 key-value heads."""
    config = LlamaConfig(
        **SHAPES[name],
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = loop.seeded(lambda: LlamaForCausalLM(config), seed)
    assert isinstance(model, LlamaForCausalLM)
    return model


def item_loss(model: LlamaForCausalLM, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum of the token losses, sum of the weights) over packed documents."""
    hidden = model.model(
        input_ids=packed.ids, attention_mask=packed.mask(), position_ids=packed.position, use_cache=False
    ).last_hidden_state[:, :-1]
    weight = packed.weight[:, 1:]
    chosen = weight > 0
    losses = F.cross_entropy(model.lm_head(hidden[chosen]).float(), packed.ids[:, 1:][chosen], reduction="none")
    return (losses * weight[chosen]).sum(), weight.sum()


def text_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the token losses, number of tokens) over rows of running text."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    total = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return total, torch.tensor(float(ids[:, 1:].numel()))


def loss(model: LlamaForCausalLM, mixture: Mixture, step: int) -> tuple[torch.Tensor, int]:
    """(mean loss, tokens) of a step: packed documents, then a row of running text."""
    packed = mixture.packed(step, BATCH["rows"], BATCH["length"])
    text = mixture.text(step, BATCH["text_rows"], BATCH["text_length"])
    items, weight = item_loss(model, packed)
    running, count = text_loss(model, text)
    return (items + running) / (weight + count), int((packed.segment > 0).sum()) + text.numel()


def make(plan: loop.Plan, output: Path, checkpoints: Path, *, resume: bool, compiled: bool) -> None:
    """Train, measure and write one of `PLANS`."""
    tokenizer = load()
    mixture = Mixture(tokenizer, plan.seed)
    model = build(plan.name, tokenizer, plan.seed)
    trained = build(plan.name, tokenizer, plan.seed)
    if compiled:
        model.model.compile()
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
        task="text-generation",
        auto="AutoModelForCausalLM",
    )


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = MEASURED_ITEMS) -> card.Figures:
    """Exact match on `n` held-out items of each pretraining family in both forms, and perplexity on real text."""
    matches = {
        name: {form: exact_match(model, tokenizer, family(), n, form) for form in FORMS}
        for name, family in world.families(pretraining=True).items()
    }
    return {"items": n, "exact_match": matches, "perplexity": round(perplexity(model, tokenizer), 2)}


def render(figures: card.Figures) -> str:
    """The figures of `measure` in Markdown."""
    lines = [
        f"Exact match by greedy generation on {figures['items']} held-out items of each family:",
        "",
        "| family | plain | chat |",
        "| --- | --- | --- |",
        *(f"| {name} | {m['plain']:.3f} | {m['chat']:.3f} |" for name, m in figures["exact_match"].items()),
        "",
        f"Perplexity per token on held-out modules of the Python standard library, in windows of 512 tokens: "
        f"{figures['perplexity']}.",
    ]
    return "\n".join(lines)
