"""SkipDecode: exactness of its caches and counts, and the loss of a model tuned to run half of its blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tunesmith.evidence import kit_text
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.evidence.kit_tune import tune
from tunesmith.inference.skipdecode import SkipDecode

BLOCKS, LENGTH, ROWS = 8, 64, 16
PRETRAIN, TUNE = 400, 80
PRETRAIN_RATE = 3e-3
RATES = (1e-3, 3e-3, 1e-2)
HALF: dict[str, Any] = {"n_min": 2, "n_max": 6, "max_length": LENGTH}
EXIT = 4

CLAIM = Claim(
    "skipdecode",
    says="Two- to five-fold faster inference with negligible regression for OPT of 1.3 and 6.7 billion parameters, "
    "with batches and key-value caches.",
    where="abstract",
    ran="Identities and counts on a random Llama of 8 blocks. Then a byte-level Llama of 8 blocks, pretrained on text "
    "of the Python standard library and tuned for 80 steps on other modules: plainly, and with n falling from 6 to 2 "
    "over 64 positions, 4 of 8 blocks on average; each with three learning rates, chosen on held-out text. Reported on "
    "other held-out text: the loss of both, of the plainly tuned model cut after its fourth block (the baseline), and "
    "of a model tuned in that cut state, which is not part of the claim.",
)


def _random() -> LlamaForCausalLM:
    model = kit_text.model(BLOCKS, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return model


def _prompts(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random bytes padded on the left, and their mask."""
    longest = max(lengths)
    ids = torch.randint(1, kit_text.BYTES, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(longest) >= (longest - torch.tensor(lengths))[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def _generate(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, new: int = 24):
    kept = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **kept)


@CLAIM.exact
def all_blocks_are_the_base_model() -> Check:
    """With n_min = n_max = L the logits are those of the model alone."""
    model = _random()
    ids, _ = _prompts((32, 32))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with SkipDecode(n_min=None, max_length=LENGTH).on(model):
            difference = (model(input_ids=ids).logits - plain).abs().max()
    return Check("largest difference", float(difference), "<=", 1e-5)


@CLAIM.exact
def cached_equals_recomputed() -> list[Check]:
    """Cached decoding equals one full pass with the training sets at every position; layers hold what they ran."""
    model, worst, holes, uncounted = _random(), 0.0, 0, 0
    ids, mask = _prompts((12, 12))
    for prompt in ("position", "max"):
        method = SkipDecode(**HALF, prompt=prompt)
        with method.on(model):
            out = _generate(model, ids, mask, new=52)
            counted = method.cost().done
            with method.prompts(torch.full((2,), 12)), torch.no_grad():
                whole = model(input_ids=out.sequences, use_cache=False).logits
            worst = max(worst, float((torch.stack(out.logits, dim=1) - whole[:, 11:-1]).abs().max()))
            ran = [method.active(0 if prompt == "max" and t < 12 else t) for t in range(63)]
            for index, layer in enumerate(out.past_key_values.layers):
                holes += layer.columns.tolist() != [t for t in range(63) if index in ran[t]]
            uncounted += counted - 2 * sum(len(active) for active in ran)
    return [
        Check("largest difference of logits", worst, "<=", 1e-5),
        Check("layers whose cache is not the positions that ran them", holes, "==", 0),
        Check("block-tokens counted - sum of n(t)", uncounted, "==", 0),
    ]


@CLAIM.exact
def a_batch_equals_its_rows() -> Check:
    """Rows of unequal lengths generate together what each generates alone."""
    model, different = _random(), 0
    ids, mask = _prompts((12, 5, 9))
    with SkipDecode(**HALF).on(model):
        together = _generate(model, ids, mask).sequences
        for row, keep, expected in zip(ids, mask, together, strict=True):
            only = row[keep.bool()][None]
            alone = _generate(model, only, torch.ones_like(only)).sequences
            different += int(not torch.equal(alone[0, only.shape[1] :], expected[12:]))
    return Check("rows that differ, of 3", different, "==", 0)


@CLAIM.exact
def half_of_the_blocks_run() -> Check:
    """Over 64 positions the schedule from 6 to 2 of 8 blocks runs half of the block-tokens."""
    model, method = _random(), SkipDecode(**HALF)
    with method.on(model), torch.no_grad():
        model(input_ids=_prompts((LENGTH,))[0])
        share = sum(method.blocks_at(t) for t in range(LENGTH)) / (LENGTH * BLOCKS)
        return Check("share counted - mean of n(t) / L", method.cost().share - share, "==", 0.0)


def _cut(model: LlamaForCausalLM, blocks: int) -> LlamaForCausalLM:
    """The same weights, read out after the first blocks."""
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:blocks]
    shallow.config.num_hidden_layers = blocks
    return shallow


@CLAIM.comparison
def half_the_blocks(seed: int) -> dict[str, float]:
    base = kit_text.model(BLOCKS, seed)
    given = kit_text.batches("pretrain", PRETRAIN, ROWS, LENGTH, 10 * seed)
    tune(base, torch.optim.AdamW(base.parameters(), lr=PRETRAIN_RATE, weight_decay=0.0), given)
    given = kit_text.batches("train", TUNE, ROWS, LENGTH, 10 * seed + 1)
    choose, report = kit_text.windows("heldout", 512, LENGTH, 10 * seed + 2).split(256)
    figures = {"before": kit_text.loss(base, report)}
    full = None
    for name in ("full", "skipdecode", "tuned exit"):
        runs = []
        for lr in RATES:
            model = _cut(base, EXIT) if name == "tuned exit" else copy.deepcopy(base)
            method = SkipDecode(**HALF) if name == "skipdecode" else SkipDecode(n_min=None, max_length=LENGTH)
            with method.on(model):
                tune(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), given)
                runs.append(
                    (kit_text.loss(model, choose), lr, kit_text.loss(model, report), method.cost().share, model)
                )
        _, figures[f"{name}, lr"], figures[name], share, best = min(runs, key=lambda run: run[0])
        if name == "skipdecode":
            figures["mean blocks"] = BLOCKS * share
        full = best if name == "full" else full
    assert full is not None
    figures["untuned exit"] = kit_text.loss(_cut(full, EXIT), report)
    figures["skipdecode / full"] = figures["skipdecode"] / figures["full"]
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    gap = figures.median("skipdecode") - figures.median("untuned exit")
    return [
        Check("loss, SkipDecode - exit after block 4 without tuning, nats per byte", gap, "<=", 0.0),
        Check("loss, SkipDecode / full depth", figures.median("skipdecode / full"), "<=", 1.15),
    ]
