"""The weights of a federation as a start and K numbers: w = w0 - lr sum_j a_j z(s_j), and what a message holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from tunesmith.core.directions import BLOCK_SIZE, Directions
from tunesmith.core.files import staged_file
from tunesmith.core.seeds import seed_of
from tunesmith.errors import CheckpointError

_FORMAT = "tunesmith.fedkseed/1"


def candidates(master: int, count: int) -> list[int]:
    """The K seeds that all parties know, from one number."""
    return [seed_of(master, "fedkseed", i) for i in range(count)]


class SeedSpace:
    """A model that moves along the directions of K seeds. z is drawn on the CPU: the same numbers on every device.

    Args:
        model: In place; what requires a gradient moves. A copy of its start and one of the last sums are kept.
        seeds: s_1..s_K.
        lr: Of all steps of the federation; the sums assume one.
    """

    def __init__(self, model: nn.Module, seeds: Sequence[int], lr: float, *, block_size: int = BLOCK_SIZE) -> None:
        self.model, self.seeds, self.lr = model, list(seeds), lr
        held = [p for p in model.parameters() if p.requires_grad]
        self.directions = Directions([{"params": held}], block_size=block_size, noise="cpu")
        self.base = self.directions.contents()
        self.start = [block.part.detach().clone() for block in self.directions.blocks]
        self._last: tuple[Tensor, list[Tensor]] | None = None

    def go(self, sums: Tensor) -> int:
        """Set the weights to what these sums say, from the start, each number added up in float32 and rounded once.

        Args:
            sums: a, (K,).

        Returns:
            Directions that were drawn: one for each sum that is not 0, none where they are those of the last call.
        """
        if self._last is not None and torch.equal(self._last[0], sums):
            for block, values in zip(self.directions.blocks, self._last[1], strict=True):
                block.part.copy_(values)
            return 0
        moves = [(s, -self.lr * a) for s, a in zip(self.seeds, sums.tolist(), strict=True) if a]
        if not moves:  # every bit of the start; -0.0 + 0.0 would be 0.0
            for block, start in zip(self.directions.blocks, self.start, strict=True):
                block.part.copy_(start)
            return 0
        made = []
        for (block, total), start in zip(self.directions.sums(moves), self.start, strict=True):
            block.part.copy_(start + total if start.dtype == torch.float64 else (start.float() + total).to(start.dtype))
            made.append(block.part.detach().clone())
        self._last = (sums.clone(), made)
        return len(moves)


@dataclass(frozen=True)
class SeedSum:
    """What a federation has learnt, in 4 K bytes: with the model that it began with, the tuned one.

    Attributes:
        sums: a, (K,) float32.
        master: The number that the K seeds come from.
        lr: Of all steps.
        base: `Directions.contents` of the weights that it began with.
    """

    sums: Tensor
    master: int
    lr: float
    base: str

    def apply_(self, model: nn.Module) -> None:
        """Turn the start into the tuned model, in place.

        Raises:
            CheckpointError: it is another model than the federation's start.
        """
        space = SeedSpace(model, candidates(self.master, len(self.sums)), self.lr)
        check_base(space.base, self.base)
        space.go(self.sums)

    def save(self, path: str | Path) -> Path:
        """As a safetensors file."""
        about = {"master": str(self.master), "lr": repr(self.lr), "base": self.base}
        with staged_file(path) as staging:
            save_file({"sums": self.sums.contiguous()}, staging, {"format": _FORMAT, **about})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SeedSum:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, or another kind of file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise CheckpointError(f"{path}: expected a {_FORMAT} file, found {about.get('format')!r}")
                return cls(file.get_tensor("sums"), int(about["master"]), float(about["lr"]), about["base"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected a {_FORMAT} file; it cannot be read ({error})") from error


def check_base(found: str, expected: str) -> None:
    """Raise `CheckpointError` unless a model is the one that a federation began with."""
    if found != expected:
        raise CheckpointError(
            f"the federation began with weights of the fingerprint {expected}, and these have {found}: every party "
            "must hold the same model, in the same dtype"
        )


def packed(tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> bytes:
    """A message: safetensors, so that nothing of it can run."""
    return save({name: t.contiguous() for name, t in tensors.items()}, {"format": _FORMAT, "about": json.dumps(about)})


def unpacked(message: bytes) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `packed` got.

    Raises:
        CheckpointError: it is no such message.
    """
    try:
        size = int.from_bytes(message[:8], "little")
        header = json.loads(message[8 : 8 + size])["__metadata__"]
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        tensors, about = load(message), json.loads(header["about"])
        if not isinstance(about, dict):
            raise ValueError(f"it says {about!r} of itself")
        return tensors, about
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"expected a {_FORMAT} message of {len(message)} bytes ({error})") from error
