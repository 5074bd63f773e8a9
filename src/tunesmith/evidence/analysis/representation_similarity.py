"""Representation similarity: the measure and what it does not see, exactly; which layers tuning changes most."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith import world
from tunesmith.analysis.representation_similarity import representation_similarity, rsa_distance
from tunesmith.core.analysis import Subjects
from tunesmith.core.report import Report
from tunesmith.core.statedict import Checkpoint
from tunesmith.evidence import kit_text, kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.world import Split

BLOCKS, LENGTH, ROWS = 6, 64, 8
PRETRAIN, STEPS, RATE = 300, 120, 1e-3

CLAIM = Claim(
    "representation-similarity",
    says="Fine-tuning changes the representations of the top two layers most; those of lower layers stay.",
    where="abstract; RQ2",
    ran="The measure against its definition on random representations, and for changes it must not see. Then a Llama "
    "of 6 blocks over bytes (width 64), trained for 300 steps on the source of the Python standard library and tuned "
    "in full for 120 steps at a learning rate of 1e-3 on items of the family `translation`; similarity of each block "
    "for 64 held-out windows of these items, the mean of their positions. The paper's layers are 12 of a code model.",
)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@CLAIM.exact
def the_measure_is_its_definition() -> list[Check]:
    """1 - distance is Pearson's correlation of the pairwise cosines, computed pair by pair."""
    worst = 0.0
    for seed in range(5):
        a = _draw(12, 6, seed=seed) + 0.5
        b = a @ _draw(6, 9, seed=seed + 10) + _draw(12, 9, seed=seed + 20)
        pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
        cosines = torch.tensor([[float(x[i] @ x[j] / x[i].norm() / x[j].norm()) for i, j in pairs] for x in (a, b)])
        expected = float(torch.corrcoef(cosines.double())[0, 1])
        worst = max(worst, abs(1 - (rsa_distance(a, b) or 0.0) - expected))
    return [Check("largest error", worst, "<=", 1e-6)]


@CLAIM.exact
def what_it_does_not_see() -> list[Check]:
    """Equal representations are at distance 0 exactly, rotated and scaled ones to rounding; a shift is seen."""
    x = _draw(16, 8)
    Q = torch.linalg.qr(_draw(8, 8, seed=1))[0]
    return [
        Check("distance of equal ones", rsa_distance(x, x.clone()) or 0.0, "==", 0),
        Check("distance after a rotation and a factor of 3", rsa_distance(x, 3 * x @ Q) or 0.0, "<=", 1e-12),
        Check("distance after a shift by 1", rsa_distance(x, x + 1) or 0.0, ">=", 0.01),
    ]


def _look(tuned: nn.Module, base: nn.Module, rows: Any) -> Report:
    models = {"tuned": tuned, "base": base}
    a, b = Checkpoint(tuned.state_dict()), Checkpoint(base.state_dict())
    return representation_similarity(Subjects(a, b, lambda which: (models[which], None), rows))


def _changes(report: Report) -> list[float]:
    """Of each block; the embedding is left out."""
    return [float(str(row[3])) for row in report.tables[0].rows if row[1] != "embedding"]


@CLAIM.exact
def a_change_shows_from_its_block_upwards() -> list[Check]:
    """With block 3 of 6 changed, blocks 0 to 2 are at distance 0 exactly, and block 3 is not."""
    base = kit_text.model(BLOCKS, 0)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[3].mlp.up_proj.weight.add_(_draw(128, 64).float() * 0.1)
    rows = [{"input_ids": ids.tolist()} for ids in kit_text.windows("heldout", 16, LENGTH, 0)]
    found = _changes(_look(tuned, base, rows))
    return [
        Check("blocks below at distance 0", sum(change == 0 for change in found[:3]), "==", 3),
        Check("distance of the block", found[3], ">=", 1e-9),
    ]


@lru_cache
def _windows(split: Split, rows: int, seed: int) -> Tensor:
    items = world.get("translation").items(2000 if split == "train" else 400, split=split, seed=0)
    text = torch.frombuffer(bytearray("".join(i.prompt + i.answer + "\n" for i in items).encode()), dtype=torch.uint8)
    starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH)].long()


@CLAIM.comparison
def layers(seed: int) -> dict[str, float]:
    """The distance of each block, and the losses that show that something was learnt."""
    base: PreTrainedModel = kit_text.model(BLOCKS, seed)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3, weight_decay=0.0)
    kit_tune.tune(base, optimizer, kit_text.batches("pretrain", PRETRAIN, ROWS, LENGTH, seed))
    tuned = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=RATE, weight_decay=0.0)
    batches = _windows("train", STEPS * ROWS, 1 + seed).split(ROWS)
    kit_tune.tune(tuned, optimizer, [{"input_ids": ids, "labels": ids} for ids in batches])
    ids = _windows("heldout", 64, 0)
    found = _changes(_look(tuned, base, [{"input_ids": row.tolist()} for row in ids]))
    figures = {f"change, block {i}": change for i, change in enumerate(found)}
    return {**figures, "loss before": kit_text.loss(base, ids), "loss after": kit_text.loss(tuned, ids)}


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The two top blocks changed more than each block below, in every seed."""
    blocks = [figures[f"change, block {i}"] for i in range(BLOCKS)]
    margins = [min(b[s] for b in blocks[-2:]) - max(b[s] for b in blocks[:-2]) for s in range(figures.seeds())]
    learnt = [a - b for a, b in zip(figures["loss before"], figures["loss after"], strict=True)]
    return [
        Check("change of the top two blocks - largest below, least of three seeds", min(margins), ">=", 0),
        Check("what tuning took off the loss, least, nats", min(learnt), ">=", 0.5),
    ]
