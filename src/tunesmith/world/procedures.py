"""Copying, reversing and sorting short lists (pretraining), and rotating or composing them (kept for fine-tuning)."""

from __future__ import annotations

import random
import string
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from tunesmith.errors import RecipeError
from tunesmith.world.base import Family, Item, whole

LONGEST = 24


class _Lists(Family):
    """Different strings of `width` letters, `min_length` to `max_length` of them, and something done to them."""

    def __init__(self, *, min_length: int = 4, max_length: int = 9, width: int = 1) -> None:
        self.min_length = whole(self.name, "min_length", min_length, 1, LONGEST)
        self.max_length = whole(self.name, "max_length", max_length, 1, LONGEST)
        self.width = whole(self.name, "width", width, 1, 4)
        if min_length > max_length:
            raise RecipeError(f"{self.name}: min_length {min_length} is larger than max_length {max_length}.")

    def draw(self, rng: random.Random) -> list[str]:
        """Different strings, in random order."""
        count = rng.randint(self.min_length, self.max_length)
        if self.width == 1:
            return rng.sample(string.ascii_lowercase, count)
        words: dict[str, None] = {}
        while len(words) < count:
            words["".join(rng.choices(string.ascii_lowercase, k=self.width))] = None
        return list(words)


class _Procedure(_Lists):
    """A list family with one fixed procedure."""

    verb: ClassVar[str]

    @abstractmethod
    def apply(self, letters: list[str]) -> list[str]:
        """What the procedure makes of a list."""

    def generate(self, rng: random.Random) -> Item:
        letters = self.draw(rng)
        answer = " ".join(self.apply(letters))
        return Item(self.name, f"{self.verb}: {' '.join(letters)}\n", answer, {"letters": letters})


class Copy(_Procedure):
    """Say a list again."""

    name = "copy"
    summary = "repeat a list of letters"
    pretraining = True
    verb = "Copy"

    def apply(self, letters: list[str]) -> list[str]:
        return letters


class Reverse(_Procedure):
    """Say a list backwards."""

    name = "reverse"
    summary = "a list of letters backwards"
    pretraining = True
    verb = "Reverse"

    def apply(self, letters: list[str]) -> list[str]:
        return letters[::-1]


class Sort(_Procedure):
    """Put a list in alphabetical order."""

    name = "sort"
    summary = "a list of letters in alphabetical order"
    pretraining = True
    verb = "Sort"

    def apply(self, letters: list[str]) -> list[str]:
        return sorted(letters)


class Rotate(_Lists):
    """A list procedure that the embedded models were not shown, alone or composed of several.

    `procedures` are applied from left to right: `("rotate",)` by default, `("sort", "reverse")` for a composition of
    two that are known, `("sort", "rotate")` for a known and an unknown one. `shift` is the largest rotation.
    """

    name = "rotate"
    summary = "rotate a list to the left, or compose procedures"
    pretraining = False

    def __init__(
        self,
        *,
        min_length: int = 4,
        max_length: int = 7,
        width: int = 1,
        shift: int = 3,
        procedures: Sequence[str] = ("rotate",),
    ) -> None:
        super().__init__(min_length=min_length, max_length=max_length, width=width)
        self.shift = whole(self.name, "shift", shift, 1, LONGEST)
        self.procedures = (procedures,) if isinstance(procedures, str) else tuple(procedures)
        unknown = [p for p in self.procedures if p not in ("copy", "reverse", "sort", "rotate")]
        if unknown or not 1 <= len(self.procedures) <= 4:
            raise RecipeError(
                f"rotate: procedures must be one to four of 'copy', 'reverse', 'sort', 'rotate', "
                f"found {self.procedures!r}."
            )

    def generate(self, rng: random.Random) -> Item:
        letters = self.draw(rng)
        shift = rng.randint(1, self.shift)
        result = letters
        for procedure in self.procedures:
            if procedure == "rotate":
                by = shift % len(letters)
                result = result[by:] + result[:by]
            else:
                result = {"copy": list, "reverse": lambda x: x[::-1], "sort": sorted}[procedure](result)
        named = [f"rotate left by {shift}" if p == "rotate" else p for p in self.procedures]
        instruction = ", then ".join(named).capitalize()
        meta = {"letters": letters, "shift": shift, "procedures": list(self.procedures)}
        return Item(self.name, f"{instruction}: {' '.join(letters)}\n", " ".join(result), meta)
