"""Segmented SFT: the loss of plain fine-tuning, whose logits over the vocabulary never exist all at once.

Wang, Chen, Li, Cao, Ren and Zhang, "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", 2025, take the
loss of long rows in segments; the idea is older than the paper, and torch has it as `linear_cross_entropy`.

    L = - 1/n sum over segments of S labels of sum_t log p(y_t | y_<t)        n labels of the whole optimizer step

Logits take S x vocabulary numbers instead of n x vocabulary, and are computed twice: 2 S V dim FLOPs more per segment.
The value and its gradient are those of `sft`, to rounding. There is no released code to compare with.
"""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from tunesmith.core.objective import Batch, Objective
from tunesmith.core.part import part
from tunesmith.core.segmented import segmented_losses


@part(
    paper="arXiv:2501.09767",
    refuses={"encoder-decoder": "its labels are those of a causal language model"},
)
class SegmentedSFT(Objective):
    """Token-mean cross-entropy of a causal language model, some labels at a time.

    Args:
        segment: S, labels at a time.
    """

    def __init__(self, *, segment: PositiveInt = 1024) -> None:
        self.segment = segment

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return segmented_losses(model, batch, self.segment).sum() / self.share(batch, total), {}
