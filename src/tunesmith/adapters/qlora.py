"""QLoRA: LoRA on every linear layer of a base whose weights are stored in four bits.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023.

    y = x doubleDequant(c1, c2, W)^T + (alpha / r) x A^T B^T                                                   (eq. 5)

W is stored in 4-bit NormalFloat, blocks of 64 with an absolute maximum each, whose constants are quantised once more to
8 bits in blocks of 256: 4.127 bits per weight. Nothing of W's size is ever made but the dequantised weight of the layer
at hand; its gradient is never formed. The optimizer's state is paged where there is a GPU (`paged_adamw_32bit`).

The storage is bitsandbytes', which `model.quantization: nf4` asks for; every adapter here runs on it. This part is the
paper's combination: named in a recipe, it asks for the quantised base, the paged optimizer, gradient checkpointing, a
constant schedule and a gradient norm of at most 0.3, unless the recipe says otherwise.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank
from tunesmith.core.part import part


@part(
    paper="arXiv:2305.14314",
    tags=("mergeable", "low-rank"),
    refuses={"float-base": "QLoRA is LoRA on a base in four bits; for one that is not quantised take `lora`"},
    extras=("quant",),
    implies={
        "model.quantization": "nf4",
        "optimizer": "paged_adamw_32bit",
        "train.gradient_checkpointing": True,
        "train.lr_schedule": "constant",
        "train.max_grad_norm": 0.3,
    },
)
class QLoRA(LowRank):
    """A LoRA with the defaults of QLoRA.

    On a layer that is not quantised it is LoRA: a loop of one's own loads the base with `BitsAndBytesConfig`.

    Args:
        layer: A linear layer, quantised or not.
        rank: r.
        alpha: Scale; the factor in front is alpha / r.
        dropout: On the input of A while training; the paper's larger models use 0.05, its smaller ones 0.1.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 64,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(layer, rank, dropout)
        self.alpha = alpha

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.alpha / self.rank
