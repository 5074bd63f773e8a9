"""Orthogonality: a regulariser that keeps the components of low-rank adapters at right angles and of length one.

Section 3.1 of Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, where it keeps
AdaLoRA's factors near the singular vectors that they stand for.

    sum over the layers of |A A^T - I|_F^2 + |B^T B - I|_F^2,      A (r, in) and B (out, r)

of every adapter that offers it (a method `orthogonality() -> Tensor`, which may have another form of it) and of PEFT's
LoRA. It does not depend on the data: a micro-batch contributes it in proportion to its labels, so that an optimizer
step has it once, however many micro-batches and processes there are. An adapter that adds the term itself, as AdaLoRA
does unless its own option is 0, is refused: it would have it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.core.adapter_term import AdapterTerm
from tunesmith.core.part import part
from tunesmith.core.steps import in_force
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2303.10512",
    tags=("regulariser",),
    refuses={"full-finetuning": "it keeps the factors of low-rank adapters orthogonal, and there is no adapter"},
)
class Orthogonality(AdapterTerm):
    """The distance of the factors of low-rank adapters from orthonormal ones; logged as `orthogonality`.

    Its weight, gamma in the paper, is given where it is added; the paper has 0.1 to 0.5.
    """

    logged: ClassVar[str] = "orthogonality"
    lacking: ClassVar[str] = "orthogonality: no adapter on this model has factors A and B or offers `orthogonality()`"

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """The term of each layer, (), differentiable, in the order of the model.

        Raises:
            ModelError: an adapter adds the term itself.
        """
        for made in in_force(model):
            if hasattr(made, "orthogonality"):
                if getattr(made, "gamma", 0) and torch.is_grad_enabled():
                    raise ModelError(
                        f"orthogonality: {type(made).__name__} on {made.layer.name!r} adds this term itself; set its "
                        "option orthogonality to 0, or leave the regulariser out"
                    )
                yield made.orthogonality()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A"):
                for name in module.active_adapters:
                    for kind in ("", "embedding_"):
                        held = getattr(module, f"lora_{kind}A"), getattr(module, f"lora_{kind}B")
                        if name in held[0]:
                            A, B = (getattr(x[name], "weight", x[name]).flatten(1) for x in held)
                            yield _distance(A) + _distance(B.T)


def _distance(factor: Tensor) -> Tensor:
    return (factor @ factor.T - torch.eye(len(factor), dtype=factor.dtype, device=factor.device)).square().sum()
