"""Factor decay: B shrinks, A stays, and what is left is AdamW."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import tunesmith
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim
from tunesmith.optimizers.factor_decay import FactorDecay

STEPS, LR = 20, 1e-2

CLAIM = Claim(
    "factor-decay",
    says="A strong decay of B and none of A keep LoRA from overconfidence on few rows (STAR's hybrid regulariser, "
    "together with dropout).",
    where="section 3.3",
    ran="Identities on a small Llama with our low-rank adapters and PEFT's. What it does for accuracy is measured with "
    "`star`, where it stands alone as one of the sides.",
)


def _model(slug: str) -> nn.Module:
    config = tunesmith.adapter(slug, rank=4)
    model = kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(kit_text.model(2, 0)), config), 0)
    g = generator(0, "moved")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.train()


def _trained(slug: str, make: Any) -> dict[str, torch.Tensor]:
    model = _model(slug)
    optimizer = make(model)
    ids = torch.randint(kit_text.BYTES, (2, 16), generator=generator(0, "ids"))
    for step in range(STEPS):
        with tunesmith.step(model, step):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _by_hand(model: nn.Module) -> torch.optim.Optimizer:
    """torch's AdamW over groups made here."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    of_b = [p for n, p in trained if n.endswith(".B") or ".lora_B." in n]
    rest = [p for n, p in trained if not (n.endswith(".B") or ".lora_B." in n)]
    return torch.optim.AdamW([{"params": of_b, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}], lr=LR)


@CLAIM.exact
def it_is_adamw_with_groups() -> list[Check]:
    """Twenty steps are those of torch's AdamW over groups made by hand; and decay matters."""
    apart, moved = 0, float("inf")
    for slug in ("lora", "pissa", "qlora"):
        ours = _trained(slug, lambda model: FactorDecay(FactorDecay.groups(model), LR))
        theirs = _trained(slug, _by_hand)
        without = _trained(slug, lambda model: FactorDecay(FactorDecay.groups(model, decay_b=0.0), LR, decay_b=0.0))
        apart += sum(not torch.equal(p, theirs[n]) for n, p in ours.items())
        norms = [sum(float(p.norm()) for n, p in found.items() if "B" in n) for found in (ours, without)]
        moved = min(moved, norms[1] / norms[0])
    return [
        Check("tensors that differ from AdamW's by hand", apart, "==", 0),
        Check("norm of B without decay / with it, smallest", moved, ">=", 1.01),
    ]


@CLAIM.exact
def zero_gradients_leave_a() -> list[Check]:
    """A step with zero gradients multiplies B by 1 - lr decay_b and leaves A bit-identical."""
    model = _model("lora")
    optimizer = FactorDecay(FactorDecay.groups(model, decay_b=0.3), lr=0.1, decay_b=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    b = max(float((after[n] - 0.97 * p).abs().max()) for n, p in before.items() if "lora_B" in n)
    a = sum(not torch.equal(after[n], p) for n, p in before.items() if "lora_A" in n)
    return [Check("largest difference of B from 0.97 B", b, "<=", 1e-7), Check("tensors A that moved", a, "==", 0)]
