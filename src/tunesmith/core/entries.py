"""Places and values of a few entries of a tensor; choosing them; telling one tensor from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError

SAMPLES = 64
"""Entries of a tensor that its digest looks at, evenly spaced."""


@dataclass(frozen=True)
class Entries:
    """Values at some places of one tensor.

    Attributes:
        shape: Of the tensor as the model stores it.
        indices: (k,) int32, or int64 for tensors of 2^31 numbers and more; places in the flattened tensor, ascending.
        values: (k,), floating.

    Raises:
        CheckpointError: indices that are no such places, or not one value for each.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        size, found = torch.Size(self.shape).numel(), self.indices
        if found.dim() != 1 or found.shape != self.values.shape or found.dtype not in (torch.int32, torch.int64):
            raise CheckpointError(
                f"expected one value for each of k integer indices, found {found.dtype} of shape {tuple(found.shape)} "
                f"and values of shape {tuple(self.values.shape)}"
            )
        if len(found) and (int(found[0]) < 0 or int(found[-1]) >= size or not bool((found[1:] > found[:-1]).all())):
            raise CheckpointError(f"indices into a tensor of {size} numbers must be ascending, different and below it")
        if not self.values.is_floating_point() or not bool(self.values.isfinite().all()):
            raise CheckpointError(f"values must be finite floating numbers, found {self.values.dtype}")

    @classmethod
    def of(cls, dense: Tensor, indices: Tensor) -> Entries:
        """Those of a dense tensor at the given places, in any order."""
        places = index_dtype(dense.numel())
        ordered = indices.sort().values
        return cls(tuple(dense.shape), ordered.to(places), dense.flatten()[ordered.long()])

    def __len__(self) -> int:
        return len(self.indices)

    def dense(self) -> Tensor:
        """The tensor with zeros everywhere else, in the dtype of the values."""
        flat = torch.zeros(torch.Size(self.shape).numel(), dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy_(0, self.indices.long(), self.values).view(self.shape)

    def added_to(self, tensor: Tensor, scale: float = 1.0) -> Tensor:
        """`tensor` + scale times this, as a new tensor of its dtype, calculated in float32 or wider."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        add_entries_(result, self, scale)
        return result


def index_dtype(numbers: int) -> torch.dtype:
    """The dtype of indices into a tensor of so many numbers."""
    return torch.int32 if numbers < 2**31 else torch.int64


def add_entries_(tensor: Tensor, entries: Entries, scale: float = 1.0) -> None:
    """`tensor` + scale times the entries, in place and rounded once to its dtype; it must be contiguous."""
    flat = tensor.view(-1)
    places = entries.indices.long().to(tensor.device)
    was = flat[places]
    wide = torch.promote_types(was.dtype, torch.float32)
    moved = was.to(wide) + scale * entries.values.to(tensor.device, wide)
    flat[places] = moved.to(tensor.dtype)


def digest(tensor: Tensor) -> int:
    """A 63-bit fingerprint of a tensor: its shape and 64 of its entries in bfloat16."""
    flat = tensor.detach().reshape(-1)
    step = max(flat.numel() // SAMPLES, 1)
    seen = flat[::step][:SAMPLES].to("cpu", torch.bfloat16)
    # -0.0 equals 0.0 and must not look different.
    content = json.dumps([list(tensor.shape), seen.float().add(0.0).tolist()])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 1


def largest(scores: Iterable[tuple[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The places of the largest positive scores of all tensors together; of equal ones the first.

    Args:
        scores: Names and scores, any shape, one tensor at a time; at most `count` candidates are kept between them.
        count: How many; fewer if fewer are above zero.

    Returns:
        Places in each flattened tensor, ascending, (k,) int64; tensors without any are left out.
    """
    names: list[str] = []
    values, owners, places = (torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.int64))
    for name, score in scores:
        flat = score.detach().flatten()
        # Compared with `least` in half precision, a score just above it could count as equal.
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        least = values.min() if len(values) >= count else values.new_zeros(())
        here = (flat > least.to(flat.device)).nonzero()[:, 0]
        names.append(name)
        values = torch.cat([values, flat[here].to("cpu", torch.float32)])
        owners = torch.cat([owners, torch.full((len(here),), len(names) - 1)])
        places = torch.cat([places, here.cpu()])
        if len(values) > count:
            # A stable sort of candidates in their order: of equal ones the first stays, exactly `count` in all.
            best = values.sort(descending=True, stable=True).indices[:count].sort().values
            values, owners, places = values[best], owners[best], places[best]
    return {name: places[owners == i] for i, name in enumerate(names) if bool((owners == i).any())}
