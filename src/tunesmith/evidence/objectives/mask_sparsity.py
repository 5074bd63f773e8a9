"""Mask sparsity: the L1 norm, its slope, once per step, and that it alone drives what nothing reads to 0."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.bridge import adapter
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim
from tunesmith.objectives.mask_sparsity import MaskSparsity

CLAIM = Claim(
    "mask-sparsity",
    says="An L1 penalty of 1e-4 on the masks of heads and neurons makes them sparse within a short estimation.",
    where="section 3.2 and released settings",
    ran="Identities on a BERT of 2 blocks. What comes of the masks is the claim of `light-peft`.",
)


def _model(planted: bool = False) -> Any:
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = kit_digits.seeded(lambda: BertForSequenceClassification(config), 0)
    if planted:
        with torch.no_grad():
            for layer in base.bert.encoder.layer:
                layer.attention.output.dense.weight[:, 8:16] = 0
                layer.output.dense.weight[:, :16] = 0
    return get_peft_model(base, adapter("structure-masks"))


def _masks(model: nn.Module) -> list[StructureMasks]:
    return [m for m in model.modules() if isinstance(m, StructureMasks)]


def _batch(rows: int = 8) -> dict[str, Tensor]:
    g = generator(0, "rows")
    ids = torch.randint(3, 32, (rows, 10), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


@CLAIM.exact
def it_is_the_norm() -> list[Check]:
    """The loss is the sum of |m|, its gradient the signs, and micro-batches add up to it."""
    model, batch, term = _model(), _batch(), MaskSparsity()
    g = generator(0, "factors")
    with torch.no_grad():
        for made in _masks(model):
            made.factors.copy_(torch.randn(made.factors.shape, generator=g))
            made.factors[1] = 0
    loss, _ = term(model, batch)
    loss.backward()
    norm = sum(float(made.factors.detach().double().abs().sum()) for made in _masks(model))
    wrong = sum(int((made.factors.grad != made.factors.sign()).sum()) for made in _masks(model))
    total = term.count(batch)
    parts = sum(float(term(model, {k: v[i : i + 3] for k, v in batch.items()}, total)[0].detach()) for i in (0, 3, 6))
    return [
        Check("difference from the norm", abs(float(loss.detach()) - norm), "<=", 1e-4),
        Check("gradients that are not the sign", wrong, "==", 0),
        Check("difference of the micro-batches' sum", abs(parts - norm), "<=", 1e-4),
    ]


@CLAIM.exact
def what_nothing_reads_goes_to_zero() -> list[Check]:
    """Factors of heads and neurons that nothing reads fall by the rate in each step with the term, and stay without."""
    ends: dict[float, list[Tensor]] = {}
    for weight in (0.0, 1e-4):
        model, batch, term = _model(planted=True), _batch(), MaskSparsity()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(40):
            loss = model(**batch).loss
            (loss + weight * term(model, batch)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        dead = [
            made.factors.detach()[1:2] if made.of == "heads" else made.factors.detach()[:16] for made in _masks(model)
        ]
        ends[weight] = dead
    fallen = torch.cat(ends[1e-4])
    return [
        Check("largest change without the term", float((torch.cat(ends[0.0]) - 1).abs().max()), "==", 0),
        Check("largest difference from 1 - 40 rates, with it", float((fallen - 0.6).abs().max()), "<=", 1e-3),
    ]


@CLAIM.exact
def without_weight_it_changes_nothing() -> Check:
    """With the weight 0, ten steps end in the same bits as without the term."""
    states = []
    for used in (False, True):
        model, batch, term = _model(), _batch(), MaskSparsity()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            loss = model(**batch).loss
            (loss + 0.0 * term(model, batch)[0] if used else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(torch.cat([made.factors.detach() for made in _masks(model)]))
    return Check("factors that differ", int((states[0] != states[1]).sum()), "==", 0)
