"""Proxy-tuning: steer a large model by what tuning changed in a small one.

Liu, Han, Wang, Tsvetkov, Choi and Smith, "Tuning Language Models by Proxy", COLM 2024.

    p(x_t | x_<t) = softmax( M(x_<t) + alpha (M+(x_<t) - M-(x_<t)) )                          (eq. 1, and Section 6.2)

with M the logits of the large model, M+ those of a small tuned model (the expert) and M- those of the same small model
untuned (the anti-expert). Log-probabilities instead of logits give the same law, since they differ by a constant per
row. A model whose interface tells only the k largest log-probabilities is steered on those k (Section 7).

Where we differ from released code: it has a generation loop of its own, whose caches go wrong under transformers 5;
this is a `LogitsProcessor` for `generate`. There, repetition penalties and the like act on the result; here those that
`generate` makes from its arguments act on M, before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import FiniteFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.core.decoding import Decoder, Step
from tunesmith.core.part import part
from tunesmith.core.sidemodel import SideModel


@part(paper="arXiv:2401.08565")
class ProxyTuning(Decoder):
    """Adds the logit change of a small tuned model to a large model's logits.

    Args:
        helpers: `expert`, the small tuned model, and `anti_expert`, the same untuned.
        tokenizer: Not needed.
        alpha: How far to move: 0 is the large model alone, 1 the paper's main setting, negative moves away.
        top_k: Combine on the k tokens that the large model ranks highest and forbid the others, as where only those
            are known; None combines on all.
    """

    roles: ClassVar[tuple[str, ...]] = ("expert", "anti_expert")
    neutral: ClassVar[Mapping[str, object]] = {"alpha": 0.0}

    def __init__(
        self,
        helpers: Mapping[str, SideModel],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        alpha: FiniteFloat = 1.0,
        top_k: PositiveInt | None = None,
    ) -> None:
        super().__init__(helpers, tokenizer)
        self.alpha = alpha
        self.top_k = top_k

    def combine(self, step: Step) -> Tensor:
        combined = step.scores + self.alpha * (step.logits["expert"] - step.logits["anti_expert"])
        if self.top_k is None:
            return combined
        kept = step.scores.topk(min(self.top_k, step.scores.shape[1])).indices
        return torch.full_like(combined, -torch.inf).scatter(1, kept, combined.gather(1, kept))
