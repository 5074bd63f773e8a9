"""A feed-forward part cut into blocks of which each token uses some, at the cost of those.

    p = sigmoid(W_r x), (N, G);  the `active` largest of a token are its blocks;  w = 2 p
    h_g = phi(w_g (W1_g x + b1_g)),   y = b2 + sum over its blocks of w_g W2_g h_g

What lies between the two layers is elementwise, so that it works on the blocks of a token laid side by side, (N, active
times the block's width), as it does on all: no module is exchanged. Tokens are grouped by block: rows are gathered,
multiplied, and added back. For the backward pass only the inputs are kept, no gathered copy and nothing before the
factor w, whose gradient follows from products that are made anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core.modelmap import roles_from_names
from tunesmith.core.surgery import Site, sites
from tunesmith.core.targets import spec_of
from tunesmith.errors import ModelError


def role(name: str) -> str:
    """The kind of a layer (`core.modelmap`); that of another attention than self-attention is `other`."""
    crossing = any("cross" in w or "encdec" in w or w == "encoder_attn" for w in name.lower().split("."))
    return "other" if crossing else roles_from_names([f"{name}.weight"])[f"{name}.weight"].kind


class Plan(nn.Module):
    """The attentions and feed-forwards of a model, looked for once for all layers of a PEFT adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites = list(sites(model).values())

    def site(self, path: str) -> Site:
        """The heads or neurons that the layer at `path` makes or reads.

        Raises:
            ModelError: it does neither.
        """
        found = next((s for s in self.sites if path == s.output or path in s.inputs), None)
        if found is None:
            raise ModelError(
                f"{path!r} is not part of an attention or a feed-forward whose layers are known by their names; leave "
                "it out of `target_modules`"
            )
        return found


def check(model: nn.Module, site: Site, blocks: int) -> None:
    """Raise unless a feed-forward divides into blocks, and gives as many numbers as it reads.

    Raises:
        ModelError: it does not.
    """
    if site.count % blocks:
        fits = [n for n in range(2, 65) if site.count % n == 0]
        raise ModelError(
            f"{site.output!r} has {site.count} neurons, which blocks={blocks} does not divide; take one of {fits}"
        )
    gives, reads = (spec_of(model.get_submodule(n), n).shape for n in (site.output, site.inputs[0]))
    if gives[0] != reads[1]:
        raise ModelError(
            f"{site.output!r} gives {gives[0]} numbers and {site.inputs[0]!r} reads {reads[1]}, from which its router "
            "would choose: a routed feed-forward is as wide at both ends"
        )


@dataclass(frozen=True)
class Route:
    """The blocks of N tokens.

    Attributes:
        chosen: (N, active) int64, the most probable first.
        weight: (N, active), 2 p of each, differentiable.
        order: (N active,) int64: places `token * active + slot`, those of block 0 first, then of block 1, ...
        counts: Tokens of each of the G blocks.
    """

    chosen: Tensor
    weight: Tensor
    order: Tensor
    counts: tuple[int, ...]

    @property
    def active(self) -> int:
        """Blocks of a token."""
        return self.chosen.shape[1]


class Router(nn.Module):
    """What chooses the blocks of a feed-forward, and remembers them from its first layers to its last.

    Args:
        width: Of the feed-forward's input.
        blocks: G.
        active: Blocks of a token.
        even: Whether W_r and b_r start at zero, where all weights are 1, and not as those of `nn.Linear`.
        device: Of the parameters, float32.
    """

    def __init__(self, width: int, blocks: int, active: int, even: bool, device: torch.device) -> None:
        super().__init__()
        made = nn.Linear(width, blocks, device=device, dtype=torch.float32)
        if even:
            nn.init.zeros_(made.weight)
            nn.init.zeros_(made.bias)
        self.weight, self.bias, self.active = made.weight, made.bias, active
        self.run = _Pass()

    def forward(self, x: Tensor) -> Route:
        """The route of the tokens (..., width), the same for all layers that read this very tensor."""
        run = self.run
        if run.way is None or run.read is not x:
            logits = project(x, self.weight).float() + self.bias
            run.read, run.way = x, route(torch.sigmoid(logits).flatten(0, -2), self.active)
        return run.way

    def take(self, tokens: int) -> Route:
        """The route of the pass that is under way, which ends.

        Raises:
            ModelError: there is none, or it is of other tokens.
        """
        way, self.run.read, self.run.way = self.run.way, None, None
        if way is None or len(way.chosen) != tokens:
            raise ModelError(
                f"the last layer of a routed feed-forward was given {tokens} tokens and the blocks of "
                f"{0 if way is None else len(way.chosen)}: its layers must all be adapted, by get_peft_model, and run "
                "one after the other on the same tokens"
            )
        return way


class _Pass:
    """The route of the pass that is under way; a copy of the model starts without."""

    def __init__(self) -> None:
        self.read: Tensor | None = None
        self.way: Route | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


def route(p: Tensor, active: int) -> Route:
    """The `active` largest of each row of (N, G); equal ones in their order. Waits for the device once."""
    ranked = torch.sort(p, dim=-1, descending=True, stable=True)
    chosen = ranked.indices[:, :active]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=p.shape[1]).tolist()
    return Route(chosen, 2 * ranked.values[:, :active], order, tuple(counts))


def project(x: Tensor, A: Tensor) -> Tensor:
    """x A^T in the dtype of A (of autocast, where it is on), (..., r); keeps `x` as it is, not a copy in that dtype."""
    return _Projection.apply(x, A, _dtype(x, A.dtype))


def into_blocks(x: Tensor, W: Tensor, bias: Tensor | None, way: Route, weighted: bool = True) -> Tensor:
    """Each token through its blocks of a layer's outputs.

    Args:
        x: (..., in), N tokens.
        W: (G width, in).
        bias: (G width,).
        way: Of these tokens.
        weighted: Whether a block's output is multiplied by its weight.

    Returns:
        (..., active width), the blocks in the order of `way.chosen`; in the dtype of `x`, or W's if not weighted.
    """
    weight = way.weight.flatten() if weighted else None
    dtype = _dtype(x, x.dtype if weighted else W.dtype)
    out = _Into.apply(x.reshape(-1, x.shape[-1]), W, bias, weight, way.order, way.counts, dtype)
    return out.view(*x.shape[:-1], way.active * (len(W) // len(way.counts)))


def out_of_blocks(h: Tensor, W: Tensor, way: Route, weighted: bool = True) -> Tensor:
    """The sum of what a token's blocks of a layer's inputs give, without bias.

    Args:
        h: (..., active width), as `into_blocks` lays it out.
        W: (out, G width).
        way: Of these tokens.
        weighted: As there.

    Returns:
        (..., out); dtypes as there.
    """
    weight = way.weight.flatten() if weighted else None
    dtype = _dtype(h, h.dtype if weighted else W.dtype)
    places = h.reshape(-1, h.shape[-1] // way.active)
    out = _Out.apply(places, W, weight, way.order, way.counts, way.active, dtype)
    return out.view(*h.shape[:-1], len(W))


def _dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else otherwise


def _groups(order: Tensor, counts: tuple[int, ...], width: int) -> Iterator[tuple[slice, Tensor]]:
    """Of each block that has tokens: its rows of the weight, and its places."""
    for block, places in enumerate(order.split(counts)):
        if len(places):
            yield slice(block * width, (block + 1) * width), places


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.dtype = dtype
        return F.linear(x.to(dtype), A.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        to_x = (grad @ A.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        to_A = (grad.reshape(-1, len(A)).T @ rows).to(A.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_A, None


class _Into(torch.autograd.Function):
    """(N, in) to (N active, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        order: Tensor,
        counts: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, W, bias, weight, order)
        ctx.counts, ctx.dtype, ctx.active = counts, dtype, len(order) // max(1, len(x))
        width = len(W) // len(counts)
        out = x.new_empty(len(order), width, dtype=dtype)
        for rows, places in _groups(order, counts, width):
            own = None if bias is None else bias[rows].to(dtype)
            y = F.linear(x[places // ctx.active].to(dtype), W[rows].to(dtype), own)
            out[places] = y if weight is None else y * weight[places, None].to(dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, bias, weight, order = ctx.saved_tensors
        for_x, for_W, for_bias, for_weight = ctx.needs_input_grad[:4]
        to_x = torch.zeros_like(x, dtype=ctx.dtype) if for_x else None
        to_W = torch.zeros_like(W) if for_W else None
        to_bias = torch.zeros_like(bias) if for_bias else None
        to_weight = torch.zeros_like(weight) if for_weight else None
        for rows, places in _groups(order, ctx.counts, len(W) // len(ctx.counts)):
            tokens, dy = places // ctx.active, grad[places].to(ctx.dtype)
            back = dy @ W[rows].to(ctx.dtype) if for_x or for_weight else None
            if to_weight is not None and back is not None:
                found = (back * x[tokens].to(ctx.dtype)).sum(-1, dtype=weight.dtype)
                if bias is not None:
                    found = found + (dy * bias[rows].to(ctx.dtype)).sum(-1, dtype=weight.dtype)
                to_weight[places] = found
            if weight is not None:
                scale = weight[places, None].to(ctx.dtype)
                dy, back = dy * scale, None if back is None else back * scale
            if to_x is not None and back is not None:
                to_x.index_add_(0, tokens, back)
            if to_W is not None:
                to_W[rows] = (dy.T @ x[tokens].to(ctx.dtype)).to(W.dtype)
            if to_bias is not None:
                to_bias[rows] = dy.sum(0).to(to_bias.dtype)
        return None if to_x is None else to_x.to(x.dtype), to_W, to_bias, to_weight, None, None, None


class _Out(torch.autograd.Function):
    """(N active, width) to (N, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        W: Tensor,
        weight: Tensor | None,
        order: Tensor,
        counts: tuple[int, ...],
        active: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(h, W, weight, order)
        ctx.counts, ctx.active, ctx.dtype = counts, active, dtype
        out = h.new_zeros(len(h) // active, len(W), dtype=dtype)
        for columns, places in _groups(order, counts, W.shape[1] // len(counts)):
            y = F.linear(h[places].to(dtype), W[:, columns].to(dtype))
            out.index_add_(0, places // active, y if weight is None else y * weight[places, None].to(dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, W, weight, order = ctx.saved_tensors
        for_h, for_W, for_weight = ctx.needs_input_grad[:3]
        to_h = torch.empty_like(h) if for_h else None
        to_W = torch.zeros_like(W) if for_W else None
        to_weight = torch.zeros_like(weight) if for_weight else None
        for columns, places in _groups(order, ctx.counts, W.shape[1] // len(ctx.counts)):
            dy, scale = grad[places // ctx.active].to(ctx.dtype), None
            if weight is not None:
                scale = weight[places, None].to(ctx.dtype)
            if for_h or for_weight:
                back = dy @ W[:, columns].to(ctx.dtype)
                if to_weight is not None:
                    to_weight[places] = (back * h[places].to(ctx.dtype)).sum(-1, dtype=weight.dtype)
                if to_h is not None:
                    to_h[places] = (back if scale is None else back * scale).to(h.dtype)
            if to_W is not None:
                dy = dy if scale is None else dy * scale
                to_W[:, columns] = (dy.T @ h[places].to(ctx.dtype)).to(W.dtype)
        return to_h, to_W, to_weight, None, None, None, None
