"""FLoRA: a small core tensor and one factor per dimension of the weight, which is never flattened.

Si, Wang, Yang, Xu, Li, Dai, Qiao, Yang and Shen, "FLoRA: Low-Rank Core Space for N-dimension", arXiv:2405.14739 (ICLR
2025 as "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning").

    W' = W + s G x_1 U_1 x_2 U_2 ... x_N U_N,      U_n of shape (d_n, r_n),  G of shape (r_1, ..., r_N)

for a weight of N dimensions d_1, ..., d_N: N = 2 for a linear layer, 3, 4 or 5 for a convolution in 1, 2 or 3
dimensions. G starts at zero, so that the change does; every unfolding of the change along dimension n has rank r_n at
most. A convolution's change is computed as three convolutions (1 x 1, the core's kernel, 1 x 1) and not as a weight.

Differences from the released code. The dimensions stand in the order of the weight (out, in, kernel). The input
dimension of a grouped convolution is in / groups, which is what the weight has; the released layer takes in and fails.
A rank above the size of its dimension is cut to that size, which loses nothing: a square factor spans the dimension
already. An embedding is a matrix like any other; the released layer for it, one vector added to every token, cannot be
built. Merging is there.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import low_rank
from tunesmith.core.part import part


@part(paper="arXiv:2405.14739", tags=("mergeable", "low-rank"))
class FLoRA(Adapter):
    """A Tucker decomposition of a weight's change.

    Args:
        layer: A linear, convolution or embedding layer.
        rank: r of the input dimension (of the rows of an embedding's table); cut to the dimension's size.
        out_rank: r of the output dimension; `rank` if not given.
        kernel_rank: r of each dimension of a kernel.
        scale: s. Under the released NLP variant (`init="normal"`) it is alpha / r.
        dropout: On the input of the change while training. An embedding has none.
        init: Of the factors: `kaiming` as released for convolutions, N(0, 1 / (2 r_n)); or `normal` as released for
            language models, N(0, 0.02^2).
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 16,
        out_rank: PositiveInt | None = None,
        kernel_rank: PositiveInt = 2,
        scale: PositiveFloat = 4.0,
        dropout: NonNegativeFloat = 0.01,
        init: Literal["kaiming", "normal"] = "kaiming",
    ) -> None:
        super().__init__(layer)
        ends = [rank, out_rank or rank]
        wanted = (ends if layer.kind == "embedding" else ends[::-1]) + [kernel_rank] * (len(layer.shape) - 2)
        self.ranks = tuple(min(r, d) for r, d in zip(wanted, layer.shape, strict=True))
        self.scale = scale
        self.core = nn.Parameter(torch.zeros(self.ranks, device=layer.device))
        self.factors = nn.ParameterList(
            torch.randn(d, r, device=layer.device) * (0.02 if init == "normal" else math.sqrt(0.5 / r))
            for d, r in zip(layer.shape, self.ranks, strict=True)
        )
        self.dropout = nn.Dropout(dropout) if dropout and layer.kind != "embedding" else None

    def _expanded(self, dimensions: range) -> Tensor:
        """The core multiplied by the factors of these dimensions; the others keep their rank."""
        out = self.core
        for n in dimensions:
            out = torch.tensordot(out, self.factors[n], dims=([n], [1])).movedim(-1, n)
        return out

    def delta(self) -> Tensor:
        """The change in the canonical shape of the weight."""
        return self.scale * self._expanded(range(len(self.ranks)))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta().to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        out, U = below(x), self.factors
        if self.layer.kind == "embedding":
            # The layer's own lookup, since some models scale what it gives.
            change = F.linear(below.apply(x, U[0], None) @ self.core, U[1])
            return out + (self.scale * change).to(out.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        if self.layer.kind == "linear":
            return out + low_rank(x, self.core @ U[1].T, U[0], self.scale).to(out.dtype)
        x = x.to(self.core.dtype)
        if self.layer.groups == 1:
            # Mixing channels commutes with every padding. An input may have no batch dimension: count from the end.
            channels = 1 - len(self.ranks)
            mixed = F.linear(x.movedim(channels, -1), U[1].T).movedim(-1, channels)
            hidden = below.apply(mixed, self._expanded(range(2, len(self.ranks))), None)
            change = F.linear(hidden.movedim(channels, -1), U[0]).movedim(-1, channels)
        else:
            # The groups share the factor of the inputs but not the rows of the outputs', so little would be saved.
            change = below.apply(x, self._expanded(range(len(self.ranks))), None)
        return out + (self.scale * change).to(out.dtype)

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        """(B, A) of the smaller rank of output and input; of a kernel's output rank, since its inputs are many.

        None for a grouped convolution: PEFT's LoRA of one has another form and could not be loaded.
        """
        U = self.factors
        if self.layer.groups > 1:
            return None
        if self.layer.kind == "conv":
            B, A = U[0], self._expanded(range(1, len(self.ranks))).flatten(1)
        else:
            table = self.layer.kind == "embedding"
            outer, inner, G = (U[1], U[0], self.core.T) if table else (U[0], U[1], self.core)
            B, A = (outer, G @ inner.T) if G.shape[0] <= G.shape[1] else (outer @ G, inner.T)
        return (self.scale * B).detach(), A.detach().contiguous()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks {self.ranks}"
