"""LoRA-GA: start A and B from the gradient, so that the first step follows full fine-tuning.

Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024.

    G = U S V^T,   A0 = c V[:, I_A]^T,   B0 = c U[:, I_B],   I_A and I_B disjoint, together {1, ..., 2r}   (Theorem 3.1)
    c = m^(1/4) / gamma^(1/2),  m = output features                                     ("stable", Theorem 3.2)
    W' = W + s (B A - B0 A0),   s = alpha / sqrt(r)

No singular value enters. One SGD step of size eta then changes W' to first order by -eta s^2 c^2 G_2r, the best
rank-2r approximation of the full gradient step; `evidence/adapters/lora_ga.py` measures that. peft's own LoRA-GA
multiplies B by the singular values and scales only B. That loses the alignment (cosine 0.64 to 0.78 to G_2r on a random
gradient) and makes the start depend on the gradient's size.

The paper subtracts s B0 A0 from the frozen weight. Here it stays beside A and B: the base is not modified, what is
saved fits the original checkpoint, and the exported LoRA has rank 2r.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.adapter import Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import OffsetLowRank, matrix_shape, to_matrix, with_signs
from tunesmith.core.part import part
from tunesmith.core.seeds import forked, generator
from tunesmith.errors import ModelError


@part(paper="arXiv:2407.05000", tags=("mergeable", "low-rank", "needs-statistics"))
class LoRAGA(OffsetLowRank):
    """A LoRA that starts along the gradient's singular directions.

    Args:
        layer: A linear or convolution layer.
        rank: r; 2r directions of the gradient are used.
        alpha: Scale.
        dropout: On the input of A while training.
        direction: Which right (A) and left (B) singular vectors: `ArB2r` (the paper's), `A2rBr`, `ArBr` (A odd, B
            even), `random` (a random split of the 2r).
        scale: `stable` (above), `unit` (c = 1), `gd` (c = 1 / s), `weight` (c = mean sqrt of sigma_i(W) / s, i <= r).
        gamma: Of the stable scale.
        rslora: s = alpha / sqrt(r), as in the paper; False gives alpha / r.
        svd: `randomised` (rank 4r, 4 iterations) or `exact`.
        clip: Shrink the start so that max |s B0 A0| <= max |W|.
        seed: Of the randomised SVD and the random split.
    """

    statistics: ClassVar[tuple[str, ...]] = ("gradient",)

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r",
        scale: Literal["stable", "unit", "gd", "weight"] = "stable",
        gamma: PositiveFloat = 16.0,
        rslora: bool = True,
        svd: Literal["randomised", "exact"] = "randomised",
        clip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(layer, rank, dropout)
        if 2 * rank > min(matrix_shape(layer)):
            raise ModelError(
                f"LoRA-GA of rank {rank} needs {2 * rank} singular directions; {layer.name!r} of shape "
                f"{tuple(layer.shape)} has {min(matrix_shape(layer))}. Lower `rank` or leave the layer out of "
                "`target_modules`."
            )
        self.direction, self.start_scale, self.gamma = direction, scale, gamma
        self.scaling = alpha / (rank**0.5 if rslora else rank)
        self.svd, self.clip, self.seed = svd, clip, seed

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        G = to_matrix(statistics["gradient"], self.layer).float()
        if not bool(G.isfinite().all()) or not bool(G.any()):
            raise ModelError(
                f"LoRA-GA: the gradient of {self.layer.name!r} is zero or not finite; look at the batches given"
            )
        U, V = self._singular_vectors(G)
        right, left = self._split()
        c = self._factor(to_matrix(W, self.layer).float())
        A, B = c * V[:, right].T, c * U[:, left]
        if self.clip:
            ratio = float(W.abs().max() / (self.scaling * (B @ A)).abs().max())
            A, B = A * min(ratio, 1.0) ** 0.5, B * min(ratio, 1.0) ** 0.5
        self.start(B, A)

    def _singular_vectors(self, G: Tensor) -> tuple[Tensor, Tensor]:
        if self.svd == "exact":
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            return with_signs(U, Vh.T)
        with forked(self.seed, "lora-ga", self.layer.name, device=G.device):
            U, _, V = torch.svd_lowrank(G, q=min(4 * self.rank, *G.shape), niter=4)
        return with_signs(U, V)

    def _split(self) -> tuple[Tensor, Tensor]:
        r, both = self.rank, torch.arange(2 * self.rank)
        if self.direction == "ArB2r":
            return both[:r], both[r:]
        if self.direction == "A2rBr":
            return both[r:], both[:r]
        if self.direction == "ArBr":
            return both[0::2], both[1::2]
        shuffled = torch.randperm(2 * r, generator=generator(self.seed, "lora-ga split", self.layer.name))
        return shuffled[:r], shuffled[r:]

    def _factor(self, W: Tensor) -> float:
        if self.start_scale == "stable":
            return self.layer.out_features**0.25 / self.gamma**0.5
        if self.start_scale == "unit":
            return 1.0
        if self.start_scale == "gd":
            return 1.0 / self.scaling
        return float((torch.linalg.svdvals(W)[: self.rank] / self.scaling).sqrt().mean())
