"""PiSSA: start A and B from the principal singular directions of the weight.

Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024.

    W = U S V^T,   B0 = U[:, :r] S_r^(1/2) / s^(1/2),   A0 = S_r^(1/2) V[:, :r]^T / s^(1/2)          (Section 3)
    W' = W + s (B A - B0 A0),   s = alpha / r

The paper subtracts s B0 A0 from the frozen weight, as PEFT's `init_lora_weights="pissa"` does. Here the starting
factors follow from the weight and stay beside A and B: the base is not modified, so that it remains the reference for
methods that compare with it, and a saved adapter fits the original checkpoint.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.adapter import Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import OffsetLowRank, to_matrix, with_signs
from tunesmith.core.part import part
from tunesmith.core.seeds import forked


@part(paper="arXiv:2404.02948", tags=("mergeable", "low-rank"))
class PiSSA(OffsetLowRank):
    """A LoRA that starts along the weight's largest singular directions.

    Args:
        layer: A linear or convolution layer.
        rank: r.
        alpha: Scale; the start is the same whatever it is.
        dropout: On the input of A while training.
        iterations: Of the randomised SVD; 0 for the exact one.
        seed: Of the randomised SVD.
    """

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        iterations: NonNegativeInt = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(layer, rank, dropout)
        self.scaling = alpha / rank
        self.iterations, self.seed = iterations, seed

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        M = to_matrix(W, self.layer).float()
        if self.iterations:
            with forked(self.seed, "pissa", self.layer.name, device=M.device):
                U, S, V = torch.svd_lowrank(M, q=min(self.rank + 5, *M.shape), niter=self.iterations)
        else:
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            V = Vh.T
        U, V = with_signs(U[:, : self.rank], V[:, : self.rank])
        root = (S[: self.rank] / self.scaling).sqrt()
        self.start(U * root, (V * root).T)
