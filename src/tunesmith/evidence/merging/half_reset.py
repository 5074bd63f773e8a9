"""Half-reset: exactly one of two tensors each; what it gives back of the old task and keeps of the new one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith import world
from tunesmith.core.halves import chosen
from tunesmith.core.merging import merged, weighted
from tunesmith.core.statedict import Checkpoint, load_into
from tunesmith.evidence import kit_text, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.merging.half_reset import HalfReset
from tunesmith.world import Split

BLOCKS, LENGTH, ROWS = 4, 64, 8
PRETRAIN, STEPS, RATE = 300, 120, 1e-3

CLAIM = Claim(
    "half-reset",
    says="A chat model half of whose parameters are set back to its base model has again much of what the base knew, "
    "and keeps most of what it was tuned for.",
    where="Section 2, the pilot experiment on Llama 2 Chat 7B",
    ran="Bit for bit on small models. Then a Llama of 4 blocks over bytes (width 64), trained for 300 steps on the "
    "source of the Python standard library and tuned in full for 120 steps at a learning rate of 1e-3 on items of the "
    "family `translation`; of its loss on either, what a reset of half of the blocks' tensors gives back and keeps, "
    "as a mean over 4 halves. Halfway between the two models, weights averaged, is reported beside it.",
)


def _small(seed: int, dtype: torch.dtype) -> Checkpoint:
    return Checkpoint({n: t.to(dtype) for n, t in kit_text.model(4, seed).state_dict().items()})


@CLAIM.exact
def each_tensor_is_one_of_the_two() -> list[Check]:
    """Every tensor is bit for bit the tuned one or the base's; what the half keeps is half of the blocks' numbers."""
    wrong, shares = 0, []
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned = _small(0, dtype), _small(1, dtype)
        for stage in range(8):
            method = HalfReset(stage=stage)
            result, kept = merged(method, [tuned], base), chosen(base, stage=stage)
            wrong += sum(not torch.equal(t, (tuned if n in kept else base)[n]) for n, t in result.items())
            inside = [n for n in base if ".layers." in n]
            shares.append(sum(base[n].numel() for n in inside if n in kept) / sum(base[n].numel() for n in inside))
    return [
        Check("tensors of 16 resets that are neither", wrong, "==", 0),
        Check("largest distance of the share kept from a half", max(abs(s - 0.5) for s in shares), "<=", 0.001),
    ]


@CLAIM.exact
def resets_of_resets() -> list[Check]:
    """Again with the same half changes nothing; with the same model on both sides nothing changes at all."""
    base, tuned = _small(0, torch.float32), _small(1, torch.float32)
    once = merged(HalfReset(), [tuned], base)
    twice = merged(HalfReset(), [once], base)
    same = merged(HalfReset(), [base], base)
    return [
        Check("tensors that a second reset changes", sum(not torch.equal(once[n], twice[n]) for n in base), "==", 0),
        Check("tensors that a reset to itself changes", sum(not torch.equal(same[n], base[n]) for n in base), "==", 0),
    ]


def _windows(split: Split, rows: int, seed: int) -> Tensor:
    items = world.get("translation").items(2000 if split == "train" else 400, split=split, seed=0)
    text = torch.frombuffer(bytearray("".join(i.prompt + i.answer + "\n" for i in items).encode()), dtype=torch.uint8)
    starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH)].long()


@CLAIM.comparison
def given_back_and_kept(seed: int) -> dict[str, float]:
    """Losses on both tasks before and after tuning, and after the reset."""
    model = kit_text.model(BLOCKS, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    kit_tune.tune(model, optimizer, kit_text.batches("pretrain", PRETRAIN, ROWS, LENGTH, seed))
    base = Checkpoint(copy.deepcopy(model.state_dict()), "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    batches = _windows("train", STEPS * ROWS, 1 + seed).split(ROWS)
    kit_tune.tune(model, optimizer, [{"input_ids": ids, "labels": ids} for ids in batches])
    tuned = Checkpoint(copy.deepcopy(model.state_dict()), "tuned")
    old, new = kit_text.windows("heldout", 128, LENGTH, 0), _windows("heldout", 128, 0)

    def losses(state: Checkpoint) -> tuple[float, float]:
        filled: PreTrainedModel = load_into(model, state)
        return kit_text.loss(filled, old), kit_text.loss(filled, new)

    before, after = losses(base), losses(tuned)
    halves = [losses(merged(HalfReset(seed=seed, stage=stage), [tuned], base)) for stage in range(4)]
    reset = (sum(a for a, _ in halves) / 4, sum(b for _, b in halves) / 4)
    middle = losses(weighted([tuned], lambda _: [0.5], base))
    points = {"base": before, "tuned": after, "half-reset": reset, "halfway": middle}
    figures = {f"old task, {key}": point[0] for key, point in points.items()}
    figures |= {f"new task, {key}": point[1] for key, point in points.items()}
    for key, point in (("half-reset", reset), ("halfway", middle)):
        figures[f"given back, {key}"] = (after[0] - point[0]) / (after[0] - before[0])
        figures[f"kept, {key}"] = (before[1] - point[1]) / (before[1] - after[1])
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """A quarter of what was forgotten comes back, half of what was learnt stays, in every seed."""
    return [
        Check("share of the forgotten given back, least", min(figures["given back, half-reset"]), ">=", 0.25),
        Check("share of the learnt kept, least", min(figures["kept, half-reset"]), ">=", 0.5),
    ]
