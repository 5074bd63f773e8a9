"""Aged AdamW: AdamW in which every entry may have an age of its own.

The optimizer of Ansell, Vulić, Sterz, Korhonen and Ponti, "Scaling Sparse Fine-Tuning to Large Language Models", 2024
(section 3.1, SpIEL-AG):

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   a <- a + 1
    w <- (1 - lr * weight_decay) w - lr (m / (1 - b1^a)) / (sqrt(v / (1 - b2^a)) + eps)

with the age a of each entry where torch's AdamW has one count for the whole tensor. A method that lets entries begin
anew (`spiel`) gives them their own ages and moments; for everything else this is AdamW. An age is a number until a
method spreads it over the entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from tunesmith.core.optimizer import Closure, Optimizer
from tunesmith.core.part import part


@part(paper="arXiv:2401.16405")
class AgedAdamW(Optimizer):
    """AdamW with ages.

    State of a parameter: `exp_avg`, `exp_avg_sq`, and the age under `step`, () or of the parameter's shape, float32.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled; for a method whose values are differences it pulls back to the base.
        betas: b1 and b2.
        eps: Added to the root.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients, as for any torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    # torch keeps what is called `step` in its dtype when a state is loaded.
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                age, m, v = state["step"].add_(1), state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                first, second = _correction(b1, age), _correction(b2, age)
                update = (m / first) / ((v / second).sqrt_().add_(group["eps"]))
                p.mul_(1 - lr * group["weight_decay"]).add_(update.to(p.dtype), alpha=-lr)
        return loss

    def state_formula(self) -> int:
        """Bytes of state while ages are single numbers: 12 per entry where they are spread."""
        return sum(2 * p.numel() * p.element_size() + 4 for group in self.param_groups for p in group["params"])


def _correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age without the cancellation that float32 would have near beta = 1."""
    return -torch.expm1(age * (math.log(beta) if beta else -math.inf))
