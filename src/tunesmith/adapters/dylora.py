"""DyLoRA: one LoRA training that is valid at every rank up to R.

Valipour, Rezagholizadeh, Kobyzev and Ghodsi, "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic
Search-Free Low-Rank Adaptation", EACL 2023.

    W' = W + (alpha / b) B[:, :b] A[:b, :],    b ~ Uniform{1, ..., R}, one draw per optimizer step for the whole model

so that the components are ordered by usefulness and any prefix of them is an adapter by itself. In the released mode
only component b learns in a step. An optimizer with momentum or weight decay would still move the others, whose
gradient is zero; `end_step` puts them back, so that they are frozen in fact.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank
from tunesmith.core.part import part
from tunesmith.core.seeds import integer
from tunesmith.errors import TunesmithError


@part(paper="arXiv:2210.07558", tags=("mergeable", "low-rank"))
class DyLoRA(LowRank):
    """A LoRA whose every rank-b prefix is trained.

    Args:
        layer: A linear, convolution or embedding layer.
        rank: R, the largest rank.
        alpha: The factor in front is alpha / b, in training and at deployment.
        dropout: On the input of A while training.
        frozen: Only component b learns in a step (the released default); False trains components 1 to b.
        seed: Of the draws of b.
    """

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        frozen: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(layer, rank, dropout)
        self.alpha, self.frozen, self.seed = alpha, frozen, seed
        self.deployed = rank
        self.drawn: int | None = None
        self._before: tuple[Tensor, Tensor] | None = None

    def begin_step(self, step: int) -> None:
        self.drawn = integer(1, self.rank, self.seed, "dylora", step)
        if self.frozen:
            self._before = (self.A.detach().clone(), self.B.detach().clone())

    def end_step(self) -> None:
        drawn, self.drawn = self.drawn, None
        if self._before is None or drawn is None:
            return
        A, B = self._before
        last = drawn - 1
        with torch.no_grad():
            A[last], B[:, last] = self.A[last], self.B[:, last]
            self.A.copy_(A)
            self.B.copy_(B)
        self._before = None

    def factors(self) -> tuple[Tensor, Tensor, float]:
        # Outside of a step, merging and export see the deployed rank, though the model may still be in training mode.
        drawn = self.drawn if self.training else None
        b = self.deployed if drawn is None else drawn
        A, B = self.A[:b], self.B[:, :b]
        if drawn is not None and self.frozen:
            A = torch.cat([A[:-1].detach(), A[-1:]])
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], dim=1)
        return B, A, self.alpha / b

    def deploy(self, *, rank: int) -> None:  # type: ignore[override]
        """Use the first `rank` components from now on, for evaluation, merging and export.

        Raises:
            TunesmithError: the rank is not in 1..R.
        """
        if not 1 <= rank <= self.rank:
            raise TunesmithError(
                f"DyLoRA on {self.layer.name!r} was trained for ranks 1 to {self.rank}; {rank} was asked"
            )
        self.deployed = rank
