"""DePT: parameters, start and positions exactly; cost counted, and score against a longer prompt of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import tunesmith
from tunesmith import world
from tunesmith.core.meters import flops, saved_bytes
from tunesmith.core.prompt import Prompt, PromptContext, PromptSpace
from tunesmith.evidence import kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.prompts.dept import DePT
from tunesmith.world import Item

DIM, LONGEST = 128, 64
PLAIN = {"num_virtual_tokens": 25, "rank": 0}
SHORT = {"num_virtual_tokens": 10, "rank": 10, "max_length": LONGEST}
"""Of equal size at width 128: 25 x 128 = 10 x 128 + 10 x (64 + 128)."""
PLAIN_RATES = ((0.03, 1.0), (0.1, 1.0), (0.3, 1.0))
SHORT_RATES = ((0.1, 0.1), (0.3, 0.01), (0.3, 0.1))
STEPS, ROWS, SHOWN = 100, 16, 400

CLAIM = Claim(
    "dept",
    says="A shorter prompt with a low-rank offset of the embeddings does better than a longer prompt of as many "
    "parameters, and saves more than 20 % of its time and memory.",
    where="abstract; Table 1; Figure 4",
    ran="Counts and identities. Cost of a training step, FLOPs and bytes saved for the backward pass, on a BERT of 4 "
    "layers and width 128 with texts of 64 tokens, prompts of 100 tokens and of 40 with an offset of rank 40. Then "
    "tiny-lm-s, frozen, is shown reviews of the family `sentiment` without the question that it knows from its "
    "pretraining, and a prompt has to stand for the question: 100 steps of 16 rows, a prompt of 25 tokens against DePT "
    "with 10 tokens and rank 10, of equal size, both started at random words, with three learning rates (for DePT, "
    "pairs of rates) each, chosen on 400 held-out items; the exact match on 400 others is reported. (A first setting, "
    "the unseen family `intents`, said nothing: both sides stayed below 1 %.)",
)


def _space(dim: int) -> PromptSpace:
    return PromptSpace(nn.Embedding(16, dim))


@CLAIM.exact
def size_is_the_formula() -> list[Check]:
    """For T5-base and inputs of 256, (m, r) = (40, 45) and (60, 30) have the size of a prompt of 100: 76,800."""
    sizes = [
        DePT(_space(768), num_virtual_tokens=m, rank=r, max_length=256).trainable_count()
        for m, r in ((100, 0), (40, 45), (60, 30))
    ]
    return [Check(f"parameters, {name}", n, "==", 76_800) for name, n in zip(("l", "m=40", "m=60"), sizes, strict=True)]


def _prompted(base: nn.Module, seed: int = 0, **options: object) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, tunesmith.adapter("dept", **options)).eval()


def _logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@CLAIM.exact
def starts_at_prompt_tuning() -> Check:
    """At the start the logits are those of prompt tuning with the same P, to the last bit."""
    ids = torch.randint(3, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    both = [_logits(_prompted(kit_tune.language_model(), num_virtual_tokens=10, rank=rank), ids) for rank in (0, 10)]
    return Check("largest difference of a logit", float((both[0] - both[1]).abs().max()), "==", 0)


def _trained() -> PeftModel:
    """DePT on tiny-lm-s, its offset as large as if it had learned."""
    model = _prompted(kit_tune.language_model(), num_virtual_tokens=5, rank=4, max_length=LONGEST)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for made in (m for m in model.modules() if isinstance(m, DePT)):
            made.B.copy_(0.1 * torch.randn(made.B.shape, generator=g))
    return model


@CLAIM.exact
def padding_changes_nothing() -> list[Check]:
    """Padded on either side, a row has the logits that it has alone."""
    model, checks = _trained(), []
    g = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 2000, (n,), generator=g) for n in (11, 7, 2)]
    for side in ("right", "left"):
        ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
            ids[i, place], mask[i, place] = row, 1
        together = _logits(model, ids, mask)
        worst = max(
            float((together[i][mask[i].bool()] - _logits(model, row[None])[0]).abs().max())
            for i, row in enumerate(rows)
        )
        checks.append(Check(f"largest difference of a logit, padding on the {side}", worst, "<=", 1e-5))
    return checks


@CLAIM.exact
def offset_belongs_to_the_position() -> list[Check]:
    """Two tokens that change places leave the offset where it was."""
    made = DePT(_space(DIM), rank=4, max_length=LONGEST)
    with torch.no_grad():
        made.B.copy_(torch.randn(made.B.shape, generator=torch.Generator().manual_seed(3)))
    ids = torch.tensor([[3, 4, 5, 6]])
    added = []
    for tokens in (ids, ids[:, [1, 0, 2, 3]]):
        out = made(PromptContext(made.P.new_zeros(1, 4, DIM), tokens > 0, torch.arange(4)[None], tokens))
        added.append(out.add.detach())
    apart = float((added[0] - added[1]).abs().max())
    return [
        Check("largest difference of the offset", apart, "==", 0),
        Check("difference between its rows", float((added[0][0, 0] - added[0][0, 1]).abs().max()), ">=", 1e-3),
    ]


@CLAIM.exact
def generating_is_computing_anew() -> Check:
    """With a cache, a generated token sees the same model as without: its own row of the offset."""
    model = _trained()
    ids = torch.randint(3, 2000, (1, 6), generator=torch.Generator().manual_seed(4))
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    anew = _logits(model, out.sequences[:, :-1])[0, 5:]
    return Check("largest difference of a logit", float((torch.cat(out.logits) - anew).abs().max()), "<=", 1e-3)


def _encoder() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=256,
        hidden_size=DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * DIM,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


@CLAIM.exact
def a_step_is_cheaper() -> list[Check]:
    """At equal size a prompt of 40 with an offset costs at least 15 % less than a prompt of 100, texts of 64 tokens."""
    ids = torch.randint(3, 256, (8, LONGEST), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(8, dtype=torch.long)
    work, kept, sizes = [], [], []
    for options in (
        {"num_virtual_tokens": 100, "rank": 0},
        {"num_virtual_tokens": 40, "rank": 40, "max_length": LONGEST},
    ):
        model = _prompted(_encoder(), **options).train()
        with saved_bytes(model) as saved:
            model(input_ids=ids, labels=labels)
        kept.append(saved.bytes)
        work.append(flops(lambda model=model: model(input_ids=ids, labels=labels).loss.backward()))
        sizes.append(sum(m.trainable_count() for m in model.modules() if isinstance(m, Prompt)))
    return [
        Check("difference in parameters", sizes[0] - sizes[1], "==", 0),
        Check("FLOPs of a step / the long prompt's", work[1] / work[0], "<=", 0.85),
        Check("saved bytes / the long prompt's", kept[1] / kept[0], "<=", 0.85),
    ]


@lru_cache
def _data(seed: int) -> tuple[list[kit_tune.Batch], list[kit_tune.Batch], list[kit_tune.Batch]]:
    family = world.get("sentiment")
    given = _unasked(family.items(STEPS * ROWS, split="train", seed=seed))
    shown = _unasked(family.items(2 * SHOWN, split="heldout", seed=0))
    return kit_tune.batches(given, ROWS), kit_tune.batches(shown[:SHOWN], 64), kit_tune.batches(shown[SHOWN:], 64)


def _unasked(items: Sequence[Item]) -> list[Item]:
    """Reviews alone, without the question."""
    return [replace(item, prompt=item.meta["text"] + "\n") for item in items]


def _groups(model: nn.Module, lr: float) -> list[dict[str, object]]:
    """The prompt's parameters, each at the rate that it asks for."""
    return [
        {"params": [p], "lr": lr * made.lr_ratios().get(name, 1.0)}
        for made in model.modules()
        if isinstance(made, Prompt)
        for name, p in made.named_parameters()
    ]


def _tuned(options: dict[str, int], lr: float, ratio: float, seed: int) -> PeftModel:
    words = torch.randint(3, 2000, (options["num_virtual_tokens"],), generator=torch.Generator().manual_seed(seed))
    model = _prompted(kit_tune.language_model(), seed, **options, init_ids=words.tolist(), lr_ratio=ratio)
    optimizer = torch.optim.AdamW(_groups(model, lr), weight_decay=1e-5)
    kit_tune.tune(model, optimizer, _data(seed)[0])
    return model


@torch.no_grad()
def _exact_match(model: nn.Module, given: Sequence[kit_tune.Batch]) -> float:
    """Percent of answers whose every token is the likeliest after those before it: greedy decoding would give them."""
    model.eval()
    right = [
        ((model(**batch).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) | (batch["labels"][:, 1:] == -100)).all(1)
        for batch in given
    ]
    return 100 * float(torch.cat(right).float().mean())


@CLAIM.comparison
def reviews(seed: int) -> dict[str, float]:
    """Exact match in percent at the best rates of each side."""
    _, choosing, reported = _data(seed)
    figures = {"untuned": _exact_match(kit_tune.language_model(), reported)}
    for name, options, rates in (("prompt", PLAIN, PLAIN_RATES), ("dept", SHORT, SHORT_RATES)):
        runs = {pair: _tuned(options, *pair, seed) for pair in rates}
        best = min(rates, key=lambda pair: kit_tune.loss(runs[pair], choosing))
        figures[name] = _exact_match(runs[best], reported)
        figures[f"{name}_loss"] = kit_tune.loss(runs[best], reported)
        figures[f"{name}_rate"], figures[f"{name}_ratio"] = best
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's threshold."""
    return [Check("DePT - prompt tuning, points", figures.median("dept") - figures.median("prompt"), ">=", -1)]
