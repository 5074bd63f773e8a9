"""Layers whose changed weight is made again in the backward pass instead of being kept: as in `core.adapter`, but
autograd keeps the layer's input alone, and the dense changed weight exists while its layer is passed through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.core.adapter import Adapter, Below


class RebuiltAdapter(Adapter):
    """An adapter that defines `weight(W)`, costs little to compute it, and leaves the bias alone."""

    def seen(self, dW: Tensor) -> None:
        """Called in each backward pass with the gradient of the changed weight, dense in the canonical shape; keep no
        reference to it."""

    def forward(self, x: Tensor, below: Below) -> Tensor:
        W, bias = below.weight, below.bias
        if W.requires_grad or (bias is not None and bias.requires_grad):
            # Another adapter below trains as well: its gradient comes through the weight, which has to be kept then.
            return below.apply(x, self.weight(W), bias)
        del W
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Rebuilt.apply(x, self, below, *self.parameters(recurse=False))


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: RebuiltAdapter, below: Below, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters, *owner.buffers(recurse=False))  # what changes meanwhile is an error
        ctx.owner, ctx.below = owner, below
        return below.apply(x, owner.weight(below.weight), below.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        owner, below = ctx.owner, ctx.below
        needs_x, _, _, *needs = ctx.needs_input_grad
        with torch.enable_grad():
            W = owner.weight(below.weight.detach())
        fixed = W.detach()
        if owner.layer.kind == "linear":
            g = grad.reshape(-1, grad.shape[-1])
            dx = F.linear(grad, fixed.to(grad.dtype).T) if needs_x else None
            dW = g.T @ x.reshape(-1, x.shape[-1]).to(g.dtype)
        else:
            with torch.enable_grad():
                fixed.requires_grad_(True)
                again = x.detach().requires_grad_(needs_x)
                y = below.apply(again, fixed, below.bias)
                dW, *rest = torch.autograd.grad(y, [fixed, again] if needs_x else [fixed], grad)
            dx = rest[0] if needs_x else None
        owner.seen(dW)
        wanted = [p for p, need in zip(owner.parameters(recurse=False), needs, strict=True) if need]
        found = iter(torch.autograd.grad(W, wanted, dW.to(W.dtype), allow_unused=True) if wanted else ())
        return dx, None, None, *(next(found) if need else None for need in needs)
