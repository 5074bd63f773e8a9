"""Factor decay: AdamW with a weight decay of its own for each of a low-rank change's two factors.

Zhang et al., "STAR: Constraint LoRA with Dynamic Active Learning for Data-Efficient Fine-Tuning of Large Language
Models", Findings of ACL 2024, section 3.3.

    A <- A - lr m^_A / (sqrt v^_A + eps) - lr decay_a A,     B likewise with decay_b

A strong decay on B, which starts at zero and alone makes the change large, keeps a model that has seen few rows from
becoming sure of itself; A keeps its directions. Everything else that trains decays as the run says; in the released
code, not at all.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import nn

from tunesmith.core.optimizer import Optimizer, decay_groups
from tunesmith.core.part import part

_FACTOR = re.compile(r"(?:^|\.)(?:lora_(?:embedding_)?)?([AB])(?:\.|$)")
"""Ours are called A and B, PEFT's `lora_A`, `lora_embedding_A` and so on."""


@part(
    paper="arXiv:2403.01165",
    refuses={"full-finetuning": "without a low-rank adapter there are no factors to decay; take adamw_torch"},
)
class FactorDecay(torch.optim.AdamW, Optimizer):
    """AdamW whose weight decay differs between A and B.

    Args:
        params: Parameters or groups; `groups` makes them for a model.
        lr: Learning rate.
        weight_decay: Of groups that name none.
        decay_a: Of the factors A.
        decay_b: Of the factors B.
        betas: Of the moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.5e-4,
        weight_decay: float = 0.0,
        *,
        decay_a: NonNegativeFloat = 0.0,
        decay_b: NonNegativeFloat = 0.5,
        betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @classmethod
    def groups(cls, model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """The factors A, the factors B, and the rest as for any optimizer."""
        decays = {"A": options.get("decay_a", 0.0), "B": options.get("decay_b", 0.5)}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kinds = {name: match[1] for name, _ in trained if (match := _FACTOR.search(name))}
        groups = [
            {"params": [p for name, p in trained if kinds.get(name) == kind], "weight_decay": decay}
            for kind, decay in decays.items()
        ]
        rest = decay_groups([(name, p) for name, p in trained if name not in kinds], model, weight_decay)
        return [group for group in (*groups, *rest) if group["params"]]

    def state_formula(self) -> int:
        """Bytes of the state: two moments of each parameter, and a counter of 4 bytes."""
        return sum(2 * p.numel() * p.element_size() + 4 for group in self.param_groups for p in group["params"])
