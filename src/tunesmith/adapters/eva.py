"""EVA: start A along the principal directions of a layer's inputs, and put rank where they explain most.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth and Hochreiter, "Parameter Efficient Fine-tuning via Explained
Variance Adaptation", NeurIPS 2025.

    cov(x) = V diag(l) V^T, l descending,   A = V[:, :r_i]^T,   B = 0                            (Theorems 3.1, 3.2)
    r_i = how many of the N r largest l_j / tr cov(x), over all N layers, are layer i's; at most rho r
    W' = W + (alpha_i / r_i) B A,   alpha_i = alpha r_i / r

These directions hold the most variance, and give B the largest expected gradient. Authors and PEFT estimate them by an
incremental PCA of randomised SVDs that stops once two batches in a row agree to a cosine of 0.99; they skip batches
with fewer tokens than components (where all are such, PEFT's loop does not end). Here the covariance is summed exactly
and decomposed once, so that neither the order nor the size of the batches enters. That costs in^2 numbers per layer
while the batches are read; `layers_per_pass` of `tunesmith.initialise` bounds how many are held.

Whitening divides by the standard deviation, so that each component of A x has the variance 1. The released code
divides by the square root of the singular values of the data matrix, which shrinks A as more tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.adapter import Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank, matrix_shape, with_signs
from tunesmith.core.part import part
from tunesmith.core.ranks import largest
from tunesmith.errors import ModelError


@part(paper="arXiv:2410.07170", tags=("mergeable", "low-rank", "needs-statistics"))
class EVA(LowRank):
    """A LoRA that reads the directions in which its layer's inputs vary most.

    Args:
        layer: A linear layer.
        rank: r, the mean over the layers; a layer without rank is left as it is.
        alpha: Scale, alpha / r if `adjust`, else alpha / r_i.
        dropout: On the input of A while training.
        rho: The largest rank of a layer is rho r (or its number of inputs); 1 gives every layer r.
        metric: What directions of different layers are compared by: `ratio`, the share of the layer's variance (the
            paper's); `raw`, the variance; `sum` and `max`, the variance over the sum or the largest of those kept.
        scale: Rows of A: `unit`, of length 1; `whiten`, over the standard deviation along them; `singular`, times
            that and over the largest.
        adjust: Scale alpha by r_i / r, so that gradients do not depend on how much rank a layer was given.
        centred: Directions of the variance; False takes the second moment, with which the mean takes up a direction.
        rslora: alpha_i / sqrt(r_i) instead of alpha_i / r_i.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    statistics: ClassVar[tuple[str, ...]] = ("input_covariance", "input_mean", "tokens")
    given: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        rho: Annotated[float, Field(ge=1)] = 2.0,
        metric: Literal["ratio", "raw", "sum", "max"] = "ratio",
        scale: Literal["unit", "whiten", "singular"] = "unit",
        adjust: bool = True,
        centred: bool = True,
        rslora: bool = False,
    ) -> None:
        super().__init__(layer, rank, dropout)
        if rank > (features := matrix_shape(layer)[1]):
            raise ModelError(
                f"EVA of rank {rank} needs as many directions of the inputs; {layer.name!r} has {features} inputs. "
                "Lower `rank` or leave the layer out of `target_modules`."
            )
        self.alpha, self.rho, self.metric, self.row_scale = alpha, rho, metric, scale
        self.adjust, self.centred, self.rslora = adjust, centred, rslora
        # Saved: a loaded adapter is made with the rank that it got, and its scale needs the rank that it had.
        self.register_buffer("given", torch.tensor(rank, device=layer.device))
        self._principal: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        C = statistics["input_covariance"].double()
        if not self.centred:
            mean = statistics["input_mean"].double()
            C = C + torch.outer(mean, mean)
        total = C.trace()
        if not bool(C.isfinite().all()) or not total > 0:
            raise ModelError(
                f"EVA: the inputs of {self.layer.name!r} do not vary over the {int(statistics['tokens'])} tokens of "
                "the batches, or are not finite"
            )
        variances, V = torch.linalg.eigh(C)
        # What rounds to nothing in the covariance has no direction: fewer tokens than components, idle features.
        least = variances[-1] * torch.finfo(torch.float32).eps * len(variances) ** 0.5
        most = min(round(self.rho * self.rank), int((variances > least).sum()))
        variances, V = variances.flip(0)[:most], V.flip(1)[:, :most]
        over = {"ratio": total, "raw": 1.0, "sum": variances.sum(), "max": variances[0]}[self.metric]
        self._principal = with_signs(V, V)[0].T, variances, variances / over

    @classmethod
    def arrange(cls, adapters: Sequence[Self]) -> None:
        found = {made.layer.name: made._principal for made in adapters}
        scores = {name: principal[2] for name, principal in found.items() if principal is not None}
        budget, held = sum(made.rank for made in adapters), sum(map(len, scores.values()))
        if held < budget:
            raise ModelError(
                f"EVA shares out {budget} directions over {len(adapters)} layers, whose inputs vary in {held} over the "
                "batches given. Give batches with more tokens, or lower `rank`."
            )
        ranks = largest(scores, budget)
        for made in adapters:
            made._begin(ranks[made.layer.name])

    def _begin(self, rank: int) -> None:
        assert self._principal is not None
        directions, variances, _ = self._principal
        self._principal = None
        if not rank:
            self.rank = 0  # it is taken off its layer
            return
        rows, deviations = directions[:rank], variances[:rank].sqrt()
        if self.row_scale == "whiten":
            rows = rows / deviations[:, None]
        elif self.row_scale == "singular":
            rows = rows * (deviations / deviations[0])[:, None]
        self.resize(rank)
        self.to(rows.device)  # the model may have moved since the layer was described
        with torch.no_grad():
            self.A.copy_(rows)

    @property
    def scaling(self) -> Tensor | float:
        """s = alpha_i / r_i; a tensor of shape () if it depends on what is saved."""
        alpha = self.alpha * self.rank / self.given if self.adjust else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.scaling * self.B, self.A, 1.0
