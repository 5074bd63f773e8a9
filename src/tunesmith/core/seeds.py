"""Random numbers addressed by keys instead of drawn in turn.

`integer(1, 8, seed, "dylora", step)` is the same number whatever was drawn before, on any device, in any process: a
resumed run needs no stored random state, and the processes of a distributed run agree without talking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Key = int | str


def seed_of(*keys: Key) -> int:
    """A 63-bit seed from any integers and strings."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*keys: Key, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator of its own for these keys."""
    return torch.Generator(device=device).manual_seed(seed_of(*keys))


@contextmanager
def forked(*keys: Key, device: str | torch.device = "cpu") -> Iterator[None]:
    """torch's own generators seeded by these keys inside the block, and afterwards as they were before."""
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if cuda else []):
        torch.manual_seed(seed_of(*keys))
        yield


def integer(low: int, high: int, *keys: Key) -> int:
    """A uniform integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator(*keys)))


def subset(n: int, k: int, *keys: Key) -> list[int]:
    """k of 0..n-1 without replacement, uniform, ascending."""
    return sorted(torch.randperm(n, generator=generator(*keys))[:k].tolist())
