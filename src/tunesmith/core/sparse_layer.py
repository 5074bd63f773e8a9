"""Adapters that change chosen entries of a layer's weight: values that train, at places that may move.

    W' = W + scatter(values)

The dense change exists for the length of one layer's forward or backward pass and is never kept: autograd keeps the
layer's input, as it does for the frozen layer, and k values. The gradient of the values is gathered from the gradient
of W', which is dense and exists while its layer is passed through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.entries import index_dtype
from tunesmith.core.layer import LayerSpec
from tunesmith.errors import ModelError


class SparseAdapter(Adapter):
    """k values at k places of the canonical weight, in float32.

    Attributes:
        indices: (k,) buffer, ascending places in the flattened canonical weight; int32 below 2^31 numbers.
        values: (k,) parameter, what is added there.
        watch: Called with the gradient of W', dense in the canonical shape, in each backward pass while it is set;
            for methods that look for better places. It must keep no reference to it.
    """

    indices: Tensor

    def __init__(self, layer: LayerSpec, count: int) -> None:
        super().__init__(layer)
        size = torch.Size(layer.shape).numel()
        if not 0 < count <= size:
            raise ModelError(
                f"{layer.name!r} has {size} entries, of which {type(self).__name__} is to train {count}; expected 1 to "
                f"{size}: change the density, or leave the layer out of `target_modules`"
            )
        self.register_buffer("indices", torch.arange(count, dtype=index_dtype(size), device=layer.device))
        self.values = nn.Parameter(torch.zeros(count, device=layer.device))
        self.watch: Any = None

    @torch.no_grad()
    def place(self, indices: Tensor, values: Tensor) -> Tensor:
        """Set places and values together.

        Args:
            indices: (k,), different, in any order; they are kept ascending.
            values: (k,), in the order of `indices`.

        Returns:
            The order that sorts them, (k,) int64, for whatever else belongs to the entries.
        """
        order = indices.argsort()
        self.indices.copy_(indices[order])
        self.values.copy_(values[order])
        return order

    def sparse(self) -> tuple[Tensor, Tensor]:
        """(places in the canonical weight, values added there) for export."""
        return self.indices, self.values.detach()

    def weight(self, W: Tensor) -> Tensor:
        flat = W.reshape(-1)
        return flat.index_add(0, self.indices, self.values.to(W.dtype)).view(W.shape)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        W, bias = below.weight, below.bias
        if W.requires_grad or (bias is not None and bias.requires_grad):
            # Another adapter below trains as well: its gradient comes through W', which autograd then has to keep.
            return below.apply(x, self.weight(W), self.bias(bias))
        del W
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Scattered.apply(x, self.values, self, below)

    def trainable_count(self) -> int:
        return self.values.numel()


class _Scattered(torch.autograd.Function):
    """The layer's operation with W + scatter(values); keeps x and the values alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, owner: SparseAdapter, below: Below) -> Tensor:
        ctx.save_for_backward(x, values, owner.indices)
        ctx.owner, ctx.below = owner, below
        return below.apply(x, owner.weight(below.weight), owner.bias(below.bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, _, indices = ctx.saved_tensors
        owner, below = ctx.owner, ctx.below
        W = owner.weight(below.weight).detach()
        needs_x = ctx.needs_input_grad[0]
        if owner.layer.kind == "linear":
            g = grad.reshape(-1, grad.shape[-1])
            dx = F.linear(grad, W.to(grad.dtype).T) if needs_x else None
            dW = g.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)
        else:
            with torch.enable_grad():
                W.requires_grad_(True)
                again = x.detach().requires_grad_(needs_x)
                y = below.apply(again, W, owner.bias(below.bias))
                dW, *rest = torch.autograd.grad(y, [W, again] if needs_x else [W], grad)
            dx = rest[0] if needs_x else None
        if owner.watch is not None:
            owner.watch(dW)
        return dx, dW.reshape(-1)[indices.long()].float(), None, None
