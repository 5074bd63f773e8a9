"""Supervised fine-tuning: the mean cross-entropy of the labelled tokens.

    L = - 1/n sum_t log p(y_t | y_<t)        over the n labels of the whole optimizer step

The baseline that other objectives are compared with.
"""

from __future__ import annotations

from torch import Tensor, nn

from tunesmith.core.loss import labelled, token_losses
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.part import part


@part(paper="", tags=("baseline",))
class SFT(Objective):
    """Token-mean cross-entropy of a causal language model."""

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return token_losses(labelled(model, batch)).sum() / self.share(batch, total), {}
