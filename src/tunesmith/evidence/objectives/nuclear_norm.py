"""Nuclear norm: its value and slope, what it does alone, and that a step has it once, of one layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.sara import SaRA
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_text
from tunesmith.evidence.claim import Check, Claim
from tunesmith.objectives.nuclear_norm import NuclearNorm, nuclear_norm

CLAIM = Claim(
    "nuclear-norm",
    says="A nuclear norm on the trained sparse matrix of one layer drawn per step keeps it of low rank.",
    where="section 3, low-rank sparse training",
    ran="Value and slope against a decomposition in float64, on a small Llama of which `sara` trains a third; gradient "
    "descent on the term alone; its draws over 200 steps, and micro-batches. What it does beside a loss is measured "
    "in the claim of `sara`.",
)


def _model() -> nn.Module:
    return get_peft_model(kit_text.model(2, 0), tunesmith.adapter("sara", density=0.3, reselect=None))


def _layers(model: nn.Module) -> list[SaRA]:
    return [m for m in model.modules() if isinstance(m, SaRA)]


def _rows(count: int) -> dict[str, Tensor]:
    ids = torch.randint(kit_text.BYTES, (count, 12), generator=generator(0, "nuclear-norm"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@CLAIM.exact
def the_slope_is_u_v() -> list[Check]:
    """Of every layer: the sum of singular values, and U V^T at the entries that train."""
    model = _model()
    value = slope = 0.0
    least = float("inf")
    for made in _layers(model):
        P = made.trained_matrix()
        U, S, Vh = torch.linalg.svd(P.detach().double(), full_matrices=False)
        loss = nuclear_norm(P)
        loss.backward()
        assert made.values.grad is not None
        expected = (U @ Vh).flatten()[made.indices.long()]
        value = max(value, float((loss.detach() / S.sum() - 1).abs()))
        slope = max(slope, float((made.values.grad - expected).abs().max()))
        least = min(least, float(S[-1] / S[0]))
    return [
        Check("smallest singular value / largest, of all layers", least, ">=", 1e-4),
        Check("largest relative difference of the value", value, "<=", 1e-5),
        Check("largest difference of the slope from U V^T", slope, "<=", 1e-4),
    ]


@CLAIM.exact
def alone_it_lowers_the_rank() -> list[Check]:
    """Gradient descent on the term of one layer: singular values above a tenth of the largest, before and after."""
    made = _layers(_model())[0]
    counts = []
    optimizer = torch.optim.SGD([made.values], lr=float(torch.linalg.svdvals(made.trained_matrix().detach())[0]) / 100)
    for _ in range(60):
        S = torch.linalg.svdvals(made.trained_matrix().detach())
        counts.append(int((0.1 * S[0] < S).sum()))
        nuclear_norm(made.trained_matrix()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [Check("share of them that is left", counts[-1] / counts[0], "<=", 0.9)]


@CLAIM.exact
def one_layer_at_a_step() -> list[Check]:
    """Layers with a gradient in 200 steps, how often each, and the sum of three micro-batches against one batch."""
    model, term, whole = _model(), NuclearNorm(), _rows(6)
    total = term.count(whole)
    seen: Counter[str] = Counter()
    several, apart = 0, 0.0
    for number in range(200):
        with tunesmith.step(model, number, 200):
            ends: list[Any] = []
            for rows in (torch.arange(6).chunk(1), torch.arange(6).chunk(3)):
                model.zero_grad()
                for piece in rows:
                    term(model, {name: value[piece] for name, value in whole.items()}, total)[0].backward()
                held = {m.layer.name: m.values.grad for m in _layers(model) if m.values.grad is not None}
                ends.append(held)
        several += int(len(ends[0]) != 1 or ends[0].keys() != ends[1].keys())
        apart = max(apart, max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]))
        seen.update(ends[0].keys())
    return [
        Check("steps with several layers, or others in micro-batches", several, "==", 0),
        Check("largest difference of a gradient by micro-batches", apart, "<=", 1e-6),
        Check("layers never drawn", len(_layers(model)) - len(seen), "==", 0),
    ]
