"""Mask sparsity: a regulariser that drives learned factors of heads and neurons to 0.

Gu et al., "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning", Findings of ACL 2024, with the
weight 1e-4 in the released settings.

    sum over the layers of |m|_1,      m (units,) the factors of `structure-masks`

of every adapter that offers it (a method `sparsity() -> Tensor`). It does not depend on the data: a micro-batch
contributes it in proportion to its labels, so that an optimizer step has it once, however many micro-batches and
processes there are. A factor of exactly 0 has no slope here and stays where it is, unless the main loss moves it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.part import part
from tunesmith.core.steps import in_force
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2406.03792",
    tags=("regulariser",),
    refuses={"full-finetuning": "it makes the factors of structure-masks sparse, and there is no adapter"},
)
class MaskSparsity(Objective):
    """The L1 norm of the factors of structure masks.

    Its weight, 1e-4 in the paper, is given where it is added. A model without any adapter has no factors: the term is 0
    there.

    Attributes:
        regularises: The adapter that it is for.
    """

    regularises: ClassVar[str] = "structure-masks"

    def count(self, batch: Batch) -> Tensor:
        """The number of labels, (); of rows, where there are no labels."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            return (labels != IGNORED).sum()
        first: Tensor = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.tensor(len(first), device=first.device)

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the term.

        Returns:
            The loss, (); and `mask_sum`, the whole term.

        Raises:
            ModelError: there are adapters, and none has factors.
        """
        terms = [made.sparsity() for made in in_force(model) if hasattr(made, "sparsity")]
        if not terms and any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise ModelError(
                "mask-sparsity: no adapter on this model has factors of heads or neurons; add `structure-masks` to the "
                "adapters, or leave the regulariser out"
            )
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        value = torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)
        return value * self.count(batch) / self.share(batch, total), {"mask_sum": value.detach()}
