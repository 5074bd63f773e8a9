"""What a family of synthetic tasks is: a generator of items with known answers, a checker, and two fixed splits."""

from __future__ import annotations

import hashlib
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

from tunesmith.errors import DataError, RecipeError

Split = Literal["train", "heldout"]
HELDOUT_IN = 10  # one content key in ten is held out
_MISSES = 20_000  # draws in a row without a new item after which a family counts as used up


@dataclass(frozen=True)
class Item:
    """One task: `prompt` ends with a newline and `prompt + answer` is its plain-text form.

    `meta` holds what the generator knew (the numbers, the person, the tests ...), for checkers and analyses.
    """

    family: str
    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> list[dict[str, str]]:
        """The chat form: one user turn, one assistant turn."""
        return [
            {"role": "user", "content": self.prompt.rstrip()},
            {"role": "assistant", "content": self.answer},
        ]


class Family(ABC):
    """A kind of task. The keyword-only arguments of `__init__` are its difficulty knobs, kept under the same names."""

    name: ClassVar[str]
    summary: ClassVar[str]
    pretraining: ClassVar[bool]
    """Whether the embedded models were shown this family, or it was kept for fine-tuning."""

    @abstractmethod
    def generate(self, rng: random.Random) -> Item:
        """One item, of whichever split it falls in; everything random about it comes from `rng`."""

    def key(self, item: Item) -> str:
        """What decides the split: items whose answers give each other away must share a key."""
        return item.prompt

    def check(self, item: Item, output: str) -> bool:
        """Whether `output` is right. Only surrounding whitespace is forgiven, unless the family says otherwise."""
        return output.strip() == item.answer

    def every_item(self) -> Iterable[Item] | None:
        """All items, where they are few enough to list; None where they are drawn instead."""
        return None

    def knobs(self) -> dict[str, Any]:
        """The difficulty knobs and their values."""
        return {name: getattr(self, name) for name in knob_names(type(self))}

    def split_of(self, item: Item) -> Split:
        """The split of `item`: a stable hash of its family and key, the same in every process and for every seed."""
        digest = hashlib.sha256(f"{self.name}\0{self.key(item)}".encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_IN == 0 else "train"

    def stream(self, *, split: Split = "train", seed: int = 0) -> Iterator[Item]:
        """Items of one split without end, repeats included (each drawn anew)."""
        rng = self._rng(split, seed)
        while True:
            item = self.generate(rng)
            if self.split_of(item) == split:
                yield item

    def items(self, n: int, *, split: Split = "train", seed: int = 0) -> list[Item]:
        """`n` items with different prompts; a larger `n` with the same seed begins with the same items.

        Raises:
            DataError: the family has fewer than `n` distinct items in this split.
        """
        if n < 0:
            raise DataError(f"{self.name}: the number of items must be 0 or more, found {n}.")
        found = list(islice(self._distinct(split, seed), n))
        if len(found) < n:
            raise DataError(
                f"{self.name}: {n} distinct {split} items were asked for, but there are only {len(found)} with the "
                f"knobs {self.knobs()}. Ask for fewer, or widen the knobs."
            )
        return found

    def _distinct(self, split: Split, seed: int) -> Iterator[Item]:
        listed = self.every_item()
        if listed is not None:
            rng = self._rng(split, seed)
            chosen = [item for item in listed if self.split_of(item) == split]
            rng.shuffle(chosen)
            yield from chosen
            return
        seen: set[str] = set()
        misses = 0
        for item in self.stream(split=split, seed=seed):
            if item.prompt not in seen:
                seen.add(item.prompt)
                misses = 0
                yield item
            elif (misses := misses + 1) > _MISSES:
                return

    def _rng(self, split: Split, seed: int) -> random.Random:
        if split not in get_args(Split):
            raise DataError(f"{self.name}: the split must be 'train' or 'heldout', found {split!r}.")
        return random.Random(f"{self.name}/{split}/{seed}")


def knob_names(family: type[Family]) -> list[str]:
    """The keyword-only arguments of a family's `__init__`."""
    parameters = inspect.signature(family).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def whole(family: str, knob: str, value: int, low: int, high: int) -> int:
    """`value`, if it is a whole number from `low` to `high`.

    Raises:
        RecipeError: it is not; the message names the family and the knob.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RecipeError(f"{family}: {knob} must be a whole number from {low} to {high}, found {value!r}.")
    return value


def one_of(family: str, knob: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        RecipeError: it is not; the message names the family and the knob.
    """
    known = list(allowed)
    if value not in known:
        raise RecipeError(f"{family}: {knob} must be one of {known}, found {value!r}.")
    return value
