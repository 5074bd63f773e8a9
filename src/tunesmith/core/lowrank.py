"""What every low-rank change shares: W' = W + s B A, without building B A where that is not needed."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.layer import LayerSpec
from tunesmith.errors import ModelError


class LowRank(Adapter):
    """W' = W + s B A on the layer's matrix view.

    The matrix view of a weight is (out, in): a convolution's kernel is flattened into its inputs, and an embedding's
    table is transposed, so that A has a column per row of the table (peft's convention).

    Args:
        layer: The layer.
        rank: r; A is (r, in) drawn as `nn.Linear` draws its weight (Kaiming uniform, a = sqrt 5), B is (out, r) zero.
        dropout: On the input of A while training. Not defined for an embedding.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, layer: LayerSpec, rank: int, dropout: float = 0.0) -> None:
        super().__init__(layer)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.resize(rank)

    def resize(self, rank: int) -> None:
        """Start anew at another rank: before training, when it is decided how much a layer gets."""
        out_features, in_features = matrix_shape(self.layer)
        device = self.A.device if "A" in self._parameters else self.layer.device  # the model may have moved since
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        if rank:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(B, A, s): (out, r'), (r', in) and the scalar in front. Override this to change the method."""
        return self.B, self.A, 1.0

    def delta(self) -> Tensor:
        """s B A in the canonical shape of the weight."""
        B, A, scale = self.factors()
        return from_matrix(scale * (B @ A), self.layer)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta().to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        B, A, scale = self.factors()
        if self.layer.kind == "embedding":
            # The layer's own lookup: some architectures scale what they find.
            return below(x) + scale * F.linear(below.apply(x, A.T, None), B)
        if self.layer.kind == "conv" and self.layer.groups > 1:
            dropped = x if self.dropout is None else self.dropout(x)
            return below(x) + below.apply(dropped, self.delta(), None)
        out = below(x)
        if self.dropout is not None:
            x = self.dropout(x)
        if self.layer.kind == "linear":
            return out + low_rank(x, A, B, scale).to(out.dtype)
        x = x.to(A.dtype)
        kernel = self.layer.shape[2:]
        hidden = below.apply(x, A.view(A.shape[0], -1, *kernel), None)
        channels = -len(kernel) - 1
        mixed = F.linear(hidden.movedim(channels, -1), B.to(hidden.dtype)).movedim(-1, channels)
        return out + (scale * mixed).to(out.dtype)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        B, A, scale = self.factors()
        return (scale * B).detach(), A.detach()


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """s x A^T B^T, keeping for the backward pass only `x` as it is.

    Written out, autograd would keep a copy of `x` in the factors' dtype and x A^T; both are cheap to compute again.

    Args:
        x: (..., in), any floating dtype.
        A: (r, in).
        B: (out, r).
        scale: s.

    Returns:
        (..., out) in the dtype of the factors; in that of autocast, where it is on.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
    return _LowRankProduct.apply(x, A, B, scale, dtype)


class _LowRankProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return F.linear(F.linear(x.to(dtype), A.to(dtype)), (scale * B).to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, A, B, ctx.scale, ctx.dtype = inputs
        ctx.save_for_backward(x, A, B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        lowered = A.to(ctx.dtype)
        hidden = grad.to(ctx.dtype) @ (ctx.scale * B).to(ctx.dtype)
        rows = x.to(ctx.dtype).reshape(-1, x.shape[-1])
        to_x = (hidden @ lowered).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_A = (hidden.reshape(-1, len(A)).T @ rows).to(A.dtype) if ctx.needs_input_grad[1] else None
        to_B = None
        if ctx.needs_input_grad[2]:
            to_B = (ctx.scale * (grad.to(ctx.dtype).reshape(-1, len(B)).T @ (rows @ lowered.T))).to(B.dtype)
        return to_x, to_A, to_B, None, None


class OffsetLowRank(LowRank):
    """W' = W + s (B A - B0 A0): a low-rank change whose factors start at (B0, A0); the model starts at the base.

    Papers subtract s B0 A0 from the frozen weight instead. Here the start stays beside the factors as buffers: the base
    is not modified, what is saved fits the original checkpoint, and the exported LoRA has rank 2r. `prepare` gives the
    start by calling `start`. Options as `LowRank`, for linear and convolution layers.

    Attributes:
        scaling: s.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    scaling: float
    A0: Tensor
    B0: Tensor

    def __init__(self, layer: LayerSpec, rank: int, dropout: float = 0.0) -> None:
        super().__init__(layer, rank, dropout)
        if rank > (most := min(matrix_shape(layer))):
            raise ModelError(
                f"{type(self).__name__} of rank {rank} starts from as many singular directions; {layer.name!r} of "
                f"shape {tuple(layer.shape)} has {most}. Lower `rank` or leave the layer out of `target_modules`."
            )

    def resize(self, rank: int) -> None:
        super().resize(rank)
        self.register_buffer("A0", torch.zeros_like(self.A))
        self.register_buffer("B0", torch.zeros_like(self.B))

    def start(self, B: Tensor, A: Tensor) -> None:
        """Set both the factors and where they started, (out, r) and (r, in)."""
        with torch.no_grad():
            for tensor, value in ((self.A, A), (self.A0, A), (self.B, B), (self.B0, B)):
                tensor.copy_(value)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        # With B0 = 0 the half is idle, but the shapes of a prepared and an unprepared adapter agree.
        return torch.cat([self.B, -self.B0], dim=1), torch.cat([self.A, self.A0]), self.scaling


def with_signs(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors in columns, the largest entry of each column of V made positive.

    Rounding decides the signs of an SVD, so that processes or batch sizes would start from other factors.
    """
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return U * signs, V * signs


def matrix_shape(layer: LayerSpec) -> tuple[int, int]:
    """(out, in) of the matrix view."""
    if layer.kind == "embedding":
        return layer.shape[1], layer.shape[0]
    return layer.shape[0], math.prod(layer.shape[1:])


def to_matrix(W: Tensor, layer: LayerSpec) -> Tensor:
    """The matrix view of a canonical weight."""
    return W.T if layer.kind == "embedding" else W.reshape(W.shape[0], -1)


def from_matrix(M: Tensor, layer: LayerSpec) -> Tensor:
    """A canonical weight from its matrix view."""
    return M.T if layer.kind == "embedding" else M.view(layer.shape)
