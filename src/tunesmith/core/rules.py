"""Update rules for a gradient, or an estimate of one, that exists a block at a time."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.core.directions import Block, move_, pieces

_MOMENTS = {"momentum": ("momentum",), "adam": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class Rule:
    """theta <- theta - lr h(g), with the state of h kept per tensor in float32 or wider.

    Attributes:
        kind: `sgd`, h(g) = g; `sign`, its sign entry by entry; `momentum`, m <- mu m + g and h = m; `adam`, Adam's.
        momentum: mu.
        betas: Of Adam.
        eps: Of Adam, added to the root of the second moment.
        block_size: By which tensors are cut.
    """

    kind: Literal["sgd", "sign", "momentum", "adam"]
    momentum: float
    betas: tuple[float, float]
    eps: float
    block_size: int

    def advance(self, block: Block, g: Tensor, lr: float, state: MutableMapping[str, Any]) -> None:
        """Move a block. All blocks of a tensor must come, the first one first.

        Args:
            block: What moves.
            g: Its gradient, of the shape of its part.
            lr: Learning rate.
            state: Of the whole tensor.
        """
        g = g.to(wide(block.tensor))
        if self.kind == "sign":
            g = g.sign()
        elif self.kind == "momentum":
            (kept,) = self._moments(block, state)
            g = kept.mul_(self.momentum).add_(g)
        elif self.kind == "adam":
            state["step"] = state.get("step", 0) + (block.number == 0)
            (b1, b2), k = self.betas, state["step"]
            mean, square = self._moments(block, state)
            mean.mul_(b1).add_(g, alpha=1 - b1)
            square.mul_(b2).addcmul_(g, g, value=1 - b2)
            g = mean / (1 - b1**k) / (square / (1 - b2**k)).sqrt_().add_(self.eps)
        move_(block.part, -lr * g)

    def _moments(self, block: Block, state: MutableMapping[str, Any]) -> list[Tensor]:
        for key in _MOMENTS[self.kind]:
            if key not in state:
                state[key] = torch.zeros_like(block.tensor, dtype=wide(block.tensor))
        return [pieces(state[key], self.block_size, block.tensor)[block.number] for key in _MOMENTS[self.kind]]

    def state_bytes(self, p: Tensor) -> int:
        """Of a tensor that has moved."""
        return len(_MOMENTS.get(self.kind, ())) * p.numel() * wide(p).itemsize


def wide(p: Tensor) -> torch.dtype:
    """Of a tensor's state: float32, or its own if that is wider."""
    return torch.promote_types(p.dtype, torch.float32)
