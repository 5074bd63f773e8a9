"""Random directions that are addressed by a seed, never stored: adding them, probing along them, replaying a run.

z(seed) is a standard normal number for every entry of a list of tensors. It is drawn block by block, each block from a
generator seeded with (seed, position of the tensor, number of the block): the same whatever was drawn before, whichever
tensors train, and in every process. What exists at a time is one block, however large a tensor is. A direction may run
through some of the groups only, and be masked: the masks are drawn like the directions, and not stored either.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tunesmith.core.masks import Mask
from tunesmith.core.seeds import seed_of
from tunesmith.core.tangents import derivative

BLOCK_SIZE = 2**22
"""Numbers in a block: 16 MiB of noise."""
Noise = Literal["device", "cpu"]
Move = tuple[int, float | Sequence[float]]
"""A seed, and how far to go along its direction: in all groups, or in each."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Probe:
    """The loss on both sides of a point.

    Attributes:
        seed: Of the direction.
        plus: Loss at theta + eps z, ().
        minus: Loss at theta - eps z, ().
        coefficient: (plus - minus) / (2 eps), `rounded`.
    """

    seed: int
    plus: Tensor
    minus: Tensor
    coefficient: float


class Block(NamedTuple):
    """Some numbers of a tensor.

    Attributes:
        place: Of the tensor, counted over all groups.
        number: Of the block in its tensor.
        group: Of the tensor.
        tensor: All of it, as the groups hold it.
        part: The numbers, a view.
    """

    place: int
    number: int
    group: int
    tensor: Tensor
    part: Tensor


def pieces(tensor: Tensor, block_size: int, like: Tensor | None = None) -> Sequence[Tensor]:
    """A tensor's blocks, views of it; or those of a tensor of its shape that is cut as `like` is."""
    # A view that is not contiguous cannot be flattened in place; such a tensor is one block.
    whole = not (tensor if like is None else like).is_contiguous()
    return (tensor,) if whole else tensor.view(-1).split(block_size)


class Directions:
    """The tensors that a direction runs through: those of the groups that require a gradient, tied ones once.

    Args:
        groups: Parameter groups, as an optimizer has them. A tensor's place in them is its address.
        block_size: Numbers drawn at a time; part of the address, so it decides which numbers they are.
        noise: Where they are drawn: on the tensor's `device`, or on the `cpu`, which gives the same numbers everywhere.
        only: Indices of the groups that it runs through; all if not given. Addresses are the same either way, and a
            tied tensor belongs to the first group that holds it.
        mask: What it leaves out within them.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        block_size: int = BLOCK_SIZE,
        noise: Noise = "device",
        only: Collection[int] | None = None,
        mask: Mask | None = None,
    ) -> None:
        self.block_size, self.noise, self.mask = block_size, noise, mask
        self._entries: list[tuple[int, int, Tensor]] = []
        self._aliases: dict[int, list[Tensor]] = {}
        self._parts: list[Block] = []
        self._generators: dict[torch.device, torch.Generator] = {}
        place = 0
        for index, group in enumerate(groups):
            for p in group["params"]:
                if p.requires_grad:
                    if p.data_ptr() not in self._aliases and (only is None or index in only):
                        self._entries.append((place, index, p.detach()))
                        cut = pieces(p.detach(), block_size)
                        self._parts += [Block(place, number, index, p, part) for number, part in enumerate(cut)]
                    self._aliases.setdefault(p.data_ptr(), []).append(p)
                place += 1

    @property
    def blocks(self) -> Sequence[Block]:
        """All blocks, in the order in which they are drawn."""
        return self._parts

    def _drawn(self, blocks: Sequence[Block], seed: int) -> Iterator[tuple[Block, Tensor]]:
        """Of every block the direction there, in float32 on the tensor's device.

        All blocks are drawn into one buffer: use what is yielded before the next one.
        """
        largest = max((block.part.numel() for block in blocks), default=0)
        buffers: dict[torch.device, Tensor] = {}
        for block in blocks:
            part = block.part
            device = torch.device("cpu") if self.noise == "cpu" else part.device
            if device not in self._generators:
                self._generators[device] = torch.Generator(device=device)
            if device not in buffers:
                buffers[device] = torch.empty(largest, device=device)
            generator = self._generators[device].manual_seed(seed_of(seed, block.place, block.number))
            z = buffers[device][: part.numel()].normal_(generator=generator)
            if self.mask is not None:
                share = self.mask.share(block.place)
                generator.manual_seed(seed_of(self.mask.seed, "mask", block.place, block.number))
                z.mul_(torch.rand(part.numel(), generator=generator, device=device) >= share)
            yield block, z.view(part.shape).to(part.device)

    @torch.no_grad()
    def add_(self, seed: int, scale: float | Sequence[float], *, times: int = 1) -> None:
        """theta <- theta + scale z(seed), rounded once to theta's dtype; `times` times, each with its own rounding.

        Args:
            scale: For all tensors, or one per group.
        """
        for block, z in self._drawn(self._parts, seed):
            step = z.mul_(_along(scale, block.group))
            for _ in range(times):
                move_(block.part, step)

    @torch.no_grad()
    def sums(self, moves: Sequence[Move]) -> Iterator[tuple[Block, Tensor]]:
        """Of every block the sum of scale z over the moves, float32; what exists at a time is a block or two."""
        for block in self._parts:
            total = torch.zeros(block.part.shape, device=block.part.device)
            for seed, scale in moves:
                (_, z), *_ = self._drawn([block], seed)
                total += z.mul_(_along(scale, block.group))
            yield block, total

    @torch.no_grad()
    def shrink_(self, rates: Sequence[float]) -> None:
        """theta <- (1 - rate) theta, one rate per group."""
        for _, group, tensor in self._entries:
            if rates[group]:
                tensor.mul_(1 - rates[group])

    @torch.no_grad()
    def probe(self, closure: Callable[[], Tensor], seed: int, eps: float, *, exact: bool = False) -> Probe:
        """Measure the loss at theta + eps z and theta - eps z, then go back to theta, also if the closure raises.

        The way is four equal steps, + - - +, and not + 2 +: a step of the same size is rounded to the same multiple of
        the last place on the way back, so the way closes except where theta changes its power of two in between.

        Args:
            closure: Returns the loss, (); it must be the same function both times.
            exact: Close the way bit for bit: the numbers that would not come back are found beforehand and kept, at 6
                to 12 bytes each, or their block is, whichever is less.
        """
        legs: list[list[Move]] = [[(seed, eps)], [(seed, -eps), (seed, -eps)], [(seed, eps)]]
        plus, minus = self.walk(closure, legs, exact=exact)
        return Probe(seed, plus, minus, rounded((float(plus) - float(minus)) / (2 * eps)))

    @torch.no_grad()
    def walk(
        self, closure: Callable[[], Tensor], legs: Sequence[Sequence[Move]], *, exact: bool = False
    ) -> list[Tensor]:
        """Measure the loss along a way that must lead back to where it began; it does also if the closure raises.

        Args:
            closure: Returns the loss, (); called after every leg but the last.
            legs: The moves of each.
            exact: Close the way bit for bit, as in `probe`.
        """
        kept = list(self._astray([move for leg in legs for move in leg])) if exact else []
        left, losses = deque(legs), []
        try:
            while len(left) > 1:
                self._go(left.popleft())
                losses.append(closure().detach())
        finally:
            for leg in left:
                self._go(leg)
            for part, where, values in kept:
                if where is None:
                    part.copy_(values)
                else:
                    part[where.long()] = values
        return losses

    def _go(self, leg: Sequence[Move]) -> None:
        for (seed, scale), same in itertools.groupby(leg):
            self.add_(seed, scale, times=len(list(same)))

    def _astray(self, path: Sequence[Move]) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        for block in self._parts:
            part, end = block.part, block.part.clone()
            for (seed, scale), same in itertools.groupby(path):
                (_, z), *_ = self._drawn([block], seed)
                step = z.mul_(_along(scale, block.group))
                for _ in same:
                    move_(end, step)
            bits = _BITS[part.element_size()]
            lost = (end.view(bits) != part.view(bits)).nonzero()
            if len(lost) * (4 + part.element_size()) >= part.numel() * part.element_size() or part.dim() != 1:
                yield part, None, part.clone()
            elif len(lost):
                yield part, lost[:, 0].int(), part[lost[:, 0]]

    @torch.no_grad()
    def derivative(self, closure: Callable[[], Tensor], seed: int) -> tuple[Tensor, float]:
        """The loss, (), and <gradient, z> in one forward pass; z is there whole meanwhile, in the tensors' dtypes.

        Raises:
            TunesmithError: something in the closure has no forward-mode derivative, or cuts it off.
        """
        tangents: dict[int, Tensor] = {}
        for block, z in self._drawn(self._parts, seed):
            whole = tangents.setdefault(block.place, torch.zeros_like(block.tensor))
            pieces(whole, self.block_size, block.tensor)[block.number].copy_(z)
        # Only tensors that share memory must each be given their tangent.
        pairs = [
            (alias, tangents[place].view(alias.shape))
            for place, _, tensor in self._entries
            for alias in self._aliases[tensor.data_ptr()]
        ]
        loss, slope = derivative(closure, pairs)
        return loss, rounded(slope)

    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a seed to mean the same direction."""
        shapes = [[place, group, list(t.shape), str(t.dtype)] for place, group, t in self._entries]
        return {
            "tensors": len(shapes),
            "numbers": sum(t.numel() for *_, t in self._entries),
            "digest": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
            "block_size": self.block_size,
            "noise": self.noise,
            "drawn_on": "cpu" if self.noise == "cpu" else ",".join(sorted({t.device.type for *_, t in self._entries})),
        }

    def contents(self) -> str:
        """A fingerprint of every bit of the tensors, read block by block."""
        seen = hashlib.blake2b(digest_size=8)
        for block in self._parts:
            seen.update(block.part.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        return seen.hexdigest()


def move_(part: Tensor, step: Tensor) -> None:
    """part <- part + step, rounded once; step is float32 or wider."""
    if part.dtype in (torch.float16, torch.bfloat16):
        part.copy_(part.float().add_(step))
    else:
        part.add_(step)


def _along(scale: float | Sequence[float], group: int) -> float:
    return scale if isinstance(scale, int | float) else scale[group]


def rounded(coefficient: float) -> float:
    """To float32, so that a trace holds exactly what was applied."""
    return float(torch.tensor(coefficient, dtype=torch.float32))


def descend_(
    directions: Directions, moves: Sequence[tuple[int, float]], lr: Sequence[float], decay: Sequence[float]
) -> None:
    """theta <- (1 - decay) theta - lr sum_i c_i z(s_i), rates per group: the update of a run and of its replay."""
    directions.shrink_(decay)
    for seed, coefficient in moves:
        directions.add_(seed, [-rate * coefficient for rate in lr])
