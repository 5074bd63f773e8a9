"""Mask sparsity: a regulariser that drives learned factors of heads and neurons to 0.

Gu et al., "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning", Findings of ACL 2024, with the
weight 1e-4 in the released settings.

    sum over the layers of |m|_1,      m (units,) the factors of `structure-masks`

of every adapter that offers it (a method `sparsity() -> Tensor`). It does not depend on the data: a micro-batch
contributes it in proportion to its labels, so that an optimizer step has it once, however many micro-batches and
processes there are. A factor of exactly 0 has no slope here and stays where it is, unless the main loss moves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from tunesmith.core.adapter_term import AdapterTerm
from tunesmith.core.part import part
from tunesmith.core.steps import in_force


@part(
    paper="arXiv:2406.03792",
    tags=("regulariser",),
    refuses={"full-finetuning": "it makes the factors of structure-masks sparse, and there is no adapter"},
)
class MaskSparsity(AdapterTerm):
    """The L1 norm of the factors of structure masks; logged as `mask_sum`.

    Its weight, 1e-4 in the paper, is given where it is added.

    Attributes:
        regularises: The adapter that it is for.
    """

    regularises: ClassVar[str] = "structure-masks"
    logged: ClassVar[str] = "mask_sum"
    lacking: ClassVar[str] = (
        "mask-sparsity: no adapter on this model has factors of heads or neurons; add `structure-masks` to the adapters"
    )

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        for made in in_force(model):
            if hasattr(made, "sparsity"):
                yield made.sparsity()
