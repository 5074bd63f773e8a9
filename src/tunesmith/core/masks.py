"""Random masks that are addressed by a seed, and shares of numbers by their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which numbers a direction leaves at zero: each with the probability of its tensor, drawn block by block.

    Attributes:
        seed: Of the mask.
        shares: Probability, for all tensors or by the tensor's place in the groups.
    """

    seed: int
    shares: float | Mapping[int, float]

    def share(self, place: int) -> float:
        """Of the tensor at this place."""
        return self.shares if isinstance(self.shares, int | float) else self.shares[place]


def smaller_shares(tensors: Mapping[int, Sequence[Tensor]], share: float) -> dict[int, float]:
    """Of each tensor the part of its numbers that are among the `share` smallest in size of all tensors together.

    Exact, in three passes over the weights and without a copy of them: the bits of sizes, as integers, have the order
    of the sizes, so the quantile is found digit by digit. Numbers are compared in float32.

    Args:
        tensors: The pieces of each tensor, by any key.
        share: Of all numbers, at least 0 and below 1; numbers as large as the quantile itself count as larger.
    """
    every = [piece for pieces in tensors.values() for piece in pieces]
    total = sum(piece.numel() for piece in every)
    wanted = max(min(int(share * total), total - 1), 0)
    quantile, shift = 0, 31
    for width in (15, 16):
        shift -= width
        counts = torch.zeros(2**width, dtype=torch.int64)
        for piece in every:
            bits = _bits(piece)
            digits = (bits[bits >> (shift + width) == quantile] >> shift) & (2**width - 1)
            counts += torch.bincount(digits, minlength=2**width).cpu()
        before = counts.cumsum(0) - counts
        at = int((before <= wanted).nonzero()[-1])
        wanted -= int(before[at])
        quantile = quantile << width | at
    below = {key: sum(int((_bits(piece) < quantile).sum()) for piece in pieces) for key, pieces in tensors.items()}
    return {key: count / max(sum(piece.numel() for piece in tensors[key]), 1) for key, count in below.items()}


def _bits(piece: Tensor) -> Tensor:
    return piece.detach().float().abs().contiguous().view(torch.int32).flatten()
