"""Operations that keep less for their backward pass: forward values are the plain ones, backward sees compressed ones.

    Q(x; i, f) = clamp(round(x 2^f), -2^(i+f), 2^(i+f) - 1) / 2^f          fixed point, 4 or 8 bits (`Fixed`)

| operation | kept for backward |
| --- | --- |
| linear layer whose weight trains | its input in fixed point; the weight |
| linear layer whose weight rests | the weight |
| product of two activations | both in fixed point |
| softmax | its output, unsigned fixed point below 1 |
| GELU and the like | the input in 4 bits; the derivative is that of the operation itself at that value |
| ReLU | one bit per number, exact |
| fused attention | q, k and v in fixed point; the rest is computed again |
| normalisation whose weight rests | the largest normalised outputs with int32 places; one number per row |

Everything is kept with `save_for_backward`, so that saved-tensor hooks (meters, offloading, checkpointing) see it all.
Each function takes the plain operation as a closure, runs it, and returns what it gave, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Plain = Callable[[], Tensor]
"""The operation as it is, with its arguments."""


@dataclass(frozen=True)
class Fixed:
    """A fixed-point format.

    Attributes:
        bits: 4, two numbers to a byte, or 8.
        integer: i, bits before the point; what remains after the sign is behind it.
        signed: Whether one bit is the sign.
        rows: Whether each row of the last dimension has an exponent e of its own, one byte more, and is kept as
            Q(x / 2^e) 2^e: the smallest with which nothing of it is clamped.
    """

    bits: int
    integer: int
    signed: bool = True
    rows: bool = False

    @property
    def scale(self) -> int:
        """2^f."""
        return 2 ** (self.bits - self.integer - int(self.signed))

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + 2**self.bits - 1

    def encode(self, x: Tensor) -> Tensor:
        """Codes of a float tensor: int8 or uint8 of its shape; a row of bytes for 4 bits, and with exponents."""
        x = x.detach()
        if not self.rows:
            return self._encode(x)
        x = x.float()
        least = x.abs().amax(-1, keepdim=True) * self.scale / self.high
        exponent = least.log2().ceil().clamp(-60, 60)  # of a row of zeros it is -inf
        codes = self._encode(x * torch.exp2(-exponent))
        return torch.cat([part.flatten().view(torch.uint8) for part in (codes, exponent.to(torch.int8))])

    def _encode(self, x: Tensor) -> Tensor:
        # A power of two and integers below 256 are exact in every float type, bf16 too.
        codes = (x * self.scale).round_().clamp_(self.low, self.high)
        if self.bits == 8:
            return codes.to(torch.int8 if self.signed else torch.uint8)
        flat = (codes - self.low).to(torch.uint8).flatten()
        flat = F.pad(flat, (0, flat.numel() % 2))
        return flat[0::2] * 16 + flat[1::2]

    def decode(self, codes: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The numbers that codes stand for."""
        if not self.rows:
            return self._decode(codes, shape, dtype)
        count = prod(shape[:-1])
        codes, exponent = codes.split([codes.numel() - count, count])
        if self.bits == 8:
            codes = codes.view(torch.int8 if self.signed else torch.uint8).view(tuple(shape))
        factor = torch.exp2(exponent.view(torch.int8).float()).view(*shape[:-1], 1)
        return (self._decode(codes, shape, torch.float32) * factor).to(dtype)

    def _decode(self, codes: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.bits == 8:
            return codes.to(dtype) / self.scale
        flat = torch.stack((codes // 16, codes % 16), dim=-1).flatten()[: prod(shape)]
        return (flat.to(dtype) + self.low).view(tuple(shape)) / self.scale


def prune(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The floor(share * n) largest numbers by magnitude, at least one, and their places: int32 where that is enough."""
    flat = x.detach().reshape(-1)
    places = flat.abs().topk(max(1, int(share * flat.numel() + 1e-6)), sorted=False).indices
    kept = flat[places]
    return kept, places.to(torch.int32) if flat.numel() < 2**31 else places


def restore(kept: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """What `prune` kept, zero elsewhere."""
    flat = kept.new_zeros(prod(shape))
    return flat.index_copy_(0, places.long(), kept).view(tuple(shape))


class Linear(torch.autograd.Function):
    """x W^T + b, and `Conv1D`'s x W + b; `codes` of x may come from another layer with the same input."""

    @staticmethod
    def forward(
        ctx: Any,
        plain: Plain,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor | None,
        form: Fixed,
        transposed: bool,
    ) -> Tensor:
        ctx.shape, ctx.dtype, ctx.form, ctx.transposed = x.shape, x.dtype, form, transposed
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(weight if x.requires_grad else None, codes if weight.requires_grad else None)
        return plain()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, codes = ctx.saved_tensors
        found: list[Tensor | None] = [None, None, None]
        rows = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[1]:
            w = weight.to(g.dtype)  # the weight's own type under autocast is not the output's
            found[0] = g.matmul(w.T if ctx.transposed else w).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            x = ctx.form.decode(codes, ctx.shape, g.dtype).reshape(-1, ctx.shape[-1])
            found[1] = (x.T @ rows if ctx.transposed else rows.T @ x).to(ctx.weight_dtype)
        if ctx.needs_input_grad[3]:
            found[2] = rows.sum(0).to(ctx.bias_dtype)
        return (None, *found, None, None, None)


class Product(torch.autograd.Function):
    """A product of two activations, of matrices or of numbers; `scale` times the decoded first one is the first one."""

    @staticmethod
    def forward(
        ctx: Any,
        plain: Plain,
        a: Tensor,
        b: Tensor,
        codes: tuple[Tensor | None, Tensor | None],
        forms: tuple[Fixed, Fixed],
        scale: float,
        matrices: bool,
    ) -> Tensor:
        ctx.shapes, ctx.dtypes, ctx.forms = (a.shape, b.shape), (a.dtype, b.dtype), forms
        ctx.scale, ctx.matrices = scale, matrices
        first = codes[0] if codes[0] is not None else forms[0].encode(a / scale if scale != 1 else a)
        second = codes[1] if codes[1] is not None else forms[1].encode(b)
        ctx.save_for_backward(first if b.requires_grad else None, second if a.requires_grad else None)
        return plain()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        to_a = to_b = None
        if ctx.needs_input_grad[1]:
            b = ctx.forms[1].decode(second, ctx.shapes[1], g.dtype)
            to_a = (g.matmul(b.transpose(-1, -2)) if ctx.matrices else g * b).sum_to_size(ctx.shapes[0])
            to_a = to_a.to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            a = ctx.forms[0].decode(first, ctx.shapes[0], g.dtype)
            a = a * ctx.scale if ctx.scale != 1 else a
            to_b = (a.transpose(-1, -2).matmul(g) if ctx.matrices else g * a).sum_to_size(ctx.shapes[1])
            to_b = to_b.to(ctx.dtypes[1])
        return None, to_a, to_b, None, None, None, None


class Softmax(torch.autograd.Function):
    """Softmax over `dim`; also returns the codes of its output, which the product with the values keeps too."""

    @staticmethod
    def forward(ctx: Any, plain: Plain, x: Tensor, dim: int, form: Fixed) -> tuple[Tensor, Tensor]:
        out = plain()
        codes = form.encode(out)
        ctx.shape, ctx.dtype, ctx.dim, ctx.form = out.shape, x.dtype, dim, form
        ctx.mark_non_differentiable(codes)
        ctx.save_for_backward(codes)
        return out, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        p = ctx.form.decode(ctx.saved_tensors[0], ctx.shape, g.dtype)
        weighted = g * p
        return None, (weighted - p * weighted.sum(ctx.dim, keepdim=True)).to(ctx.dtype), None, None


class Activation(torch.autograd.Function):
    """A function of each number by itself, `apply`, whose derivative is taken at the decoded input."""

    @staticmethod
    def forward(ctx: Any, apply: Callable[[Tensor], Tensor], x: Tensor, form: Fixed) -> Tensor:
        ctx.function, ctx.shape, ctx.dtype, ctx.form = apply, x.shape, x.dtype, form
        ctx.save_for_backward(form.encode(x))
        return apply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.form.decode(ctx.saved_tensors[0], ctx.shape, ctx.dtype).requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        (found,) = torch.autograd.grad(y, x, g)
        return None, found, None


class ReLU(torch.autograd.Function):
    """max(x, 0): whether each number is above 0, eight to a byte."""

    @staticmethod
    def forward(ctx: Any, plain: Plain, x: Tensor) -> Tensor:
        above = F.pad((x > 0).flatten(), (0, -x.numel() % 8)).view(-1, 8)
        ctx.shape = x.shape
        ctx.save_for_backward((above * _bits(x.device)).sum(1, dtype=torch.uint8))
        return plain()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        above = (codes[:, None] & _bits(codes.device)).ne(0).flatten()[: g.numel()].view(ctx.shape)
        return None, g * above


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


class Norm(torch.autograd.Function):
    """(x - mean) / std * (weight + offset) + bias, or without the mean, where the weight rests.

    With n = the pruned normalised input and h = g (weight + offset):  (h - mean(h) - n mean(n h)) / std.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plain: Plain,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: bool,
        offset: float,
        eps: float,
        dims: int,
        share: float,
    ) -> Tensor:
        ctx.over, ctx.centred, ctx.offset = tuple(range(-dims, 0)), centred, offset
        ctx.shape, ctx.dtype, ctx.bias_like = x.shape, x.dtype, None if bias is None else (bias.shape, bias.dtype)
        values = x.detach().float()
        if centred:
            values = values - values.mean(ctx.over, keepdim=True)
        inverse = (values.square().mean(ctx.over, keepdim=True) + eps).rsqrt()
        kept, places = prune((values * inverse).to(x.dtype), share)
        ctx.save_for_backward(kept, places, inverse, weight)
        return plain()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, places, inverse, weight = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[1]:
            h = g.float() if weight is None else g.float() * (weight.float() + ctx.offset)
            n = restore(kept, places, ctx.shape).float()
            found = h - n * (n * h).mean(ctx.over, keepdim=True)
            if ctx.centred:
                found = found - h.mean(ctx.over, keepdim=True)
            to_x = (found * inverse).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.bias_like
            to_bias = g.sum_to_size(shape).to(dtype)
        return None, to_x, None, to_bias, None, None, None, None, None


class Attention(torch.autograd.Function):
    """Fused attention, computed again in the backward pass from compressed q, k and v; the mask is kept as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        form: Fixed,
        random: bool,
    ) -> Tensor:
        ctx.attend, ctx.form = attend, form
        ctx.shapes, ctx.dtype, ctx.device = (q.shape, k.shape, v.shape), q.dtype, q.device
        ctx.grads = tuple(t is not None and t.requires_grad for t in (q, k, v, mask))
        ctx.save_for_backward(*(form.encode(t) for t in (q, k, v)), mask, _random_state(q.device) if random else None)
        return attend(q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *codes, mask, state = ctx.saved_tensors
        kept = zip(codes, ctx.shapes, strict=True)
        inputs: list[Any] = [ctx.form.decode(part, shape, ctx.dtype) for part, shape in kept]
        inputs.append(None if mask is None else mask.detach())
        wanted = [t.requires_grad_() for t, needed in zip(inputs, ctx.grads, strict=True) if needed]
        devices = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices, enabled=state is not None):
            if state is not None:  # the same dropout as in the forward pass
                _set_random_state(state, ctx.device)
            out = ctx.attend(*inputs)
        found = iter(torch.autograd.grad(out, wanted, g))
        return (None, *(next(found) if needed else None for needed in ctx.grads), None, None)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state)
