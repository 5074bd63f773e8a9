"""Aged AdamW: torch's AdamW while all entries are of one age."""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.core.meters import state_bytes
from tunesmith.core.seeds import generator
from tunesmith.evidence.claim import Check, Claim
from tunesmith.optimizers.aged_adamw import AgedAdamW

CLAIM = Claim(
    "aged-adamw",
    says="Grown entries are bias-corrected by their own age; without any, the optimizer is Adam.",
    where="section 3.1 of the paper of SpIEL",
    ran="Beside torch's AdamW on the same gradients; and an entry whose age is set to 0 beside one that begins then.",
)


@CLAIM.exact
def one_age_is_adamw() -> list[Check]:
    """Five steps with weight decay, the same gradients."""
    ours, theirs = (nn.Parameter(torch.ones(40, 30)) for _ in range(2))
    one = AgedAdamW([ours], lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        ours.grad = torch.randn(40, 30, generator=generator(0, step))
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    return [
        Check("largest difference of a weight", float((ours - theirs).abs().max()), "<=", 6e-7),
        Check("largest move of a weight", float((ours - 1).abs().max()), ">=", 1e-2),
        Check("bytes of state - those of AdamW", state_bytes(one) - state_bytes(other), "==", 0),
    ]


@CLAIM.exact
def an_entry_goes_by_its_own_age() -> Check:
    """Set to age 0 after three steps, an entry does what a new optimizer does, bit for bit."""
    old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    one, other = AgedAdamW([old], lr=0.1), AgedAdamW([new], lr=0.1)
    for step in range(8):
        grad = torch.randn(2, generator=generator(1, step))
        if step == 3:
            state = one.state[old]
            state["step"] = torch.tensor([3.0, 0.0])
            for moment in (state["exp_avg"], state["exp_avg_sq"], old.data):
                moment[1] = 0.0
        old.grad = grad
        one.step()
        if step >= 3:
            new.grad = grad[1:].clone()
            other.step()
    return Check("difference of the entry", float((old[1] - new[0]).abs()), "==", 0)
