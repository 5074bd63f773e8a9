"""Addition (pretraining) and calculations with worked steps (kept for fine-tuning)."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterable

from tunesmith.errors import RecipeError
from tunesmith.world.base import Family, Item, one_of, whole

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_STEP = re.compile(r"(-?\d+) ([+*-]) (-?\d+) = (-?\d+)")


class Addition(Family):
    """The sum of two numbers of exactly `digits` digits."""

    name = "addition"
    summary = "the sum of two numbers of `digits` digits"
    pretraining = True

    def __init__(self, *, digits: int = 2) -> None:
        self.digits = whole(self.name, "digits", digits, 1, 9)

    def generate(self, rng: random.Random) -> Item:
        low, high = self._range()
        return self._item(rng.randint(low, high), rng.randint(low, high))

    def key(self, item: Item) -> str:
        """The unordered pair: 12 + 34 gives 34 + 12 away."""
        return "+".join(map(str, sorted((item.meta["a"], item.meta["b"]))))

    def every_item(self) -> Iterable[Item] | None:
        low, high = self._range()
        if self.digits > 2:
            return None
        return (self._item(a, b) for a in range(low, high + 1) for b in range(low, high + 1))

    def _range(self) -> tuple[int, int]:
        return (0 if self.digits == 1 else 10 ** (self.digits - 1)), 10**self.digits - 1

    def _item(self, a: int, b: int) -> Item:
        return Item(self.name, f"Add: {a} + {b}\n", str(a + b), {"a": a, "b": b})


class Steps(Family):
    """A chain of operations, worked from left to right one line at a time, then `Answer: N`.

    `operations` (a string such as "+-" or "+-*") are drawn from; `terms` is the largest count of numbers in the chain.
    """

    name = "steps"
    summary = "a calculation worked from left to right, then its result"
    pretraining = False

    def __init__(self, *, min_terms: int = 3, terms: int = 4, largest: int = 20, operations: str = "+-") -> None:
        self.min_terms = whole(self.name, "min_terms", min_terms, 2, 12)
        self.terms = whole(self.name, "terms", terms, 2, 12)
        self.largest = whole(self.name, "largest", largest, 1, 9999)
        if min_terms > terms:
            raise RecipeError(f"steps: min_terms {min_terms} is larger than terms {terms}.")
        if not operations:
            raise RecipeError("steps: operations must name at least one of '+', '-', '*', found ''.")
        for sign in operations:
            one_of(self.name, "operations", sign, OPERATIONS)
        self.operations = operations

    def generate(self, rng: random.Random) -> Item:
        numbers = [rng.randint(1, self.largest) for _ in range(rng.randint(self.min_terms, self.terms))]
        signs = [rng.choice(self.operations) for _ in numbers[1:]]
        total = numbers[0]
        chain, lines = [str(total)], []
        for sign, number in zip(signs, numbers[1:], strict=True):
            result = OPERATIONS[sign](total, number)
            lines.append(f"{total} {sign} {number} = {result}")
            chain += [sign, str(number)]
            total = result
        answer = "\n".join([*lines, f"Answer: {total}"])
        meta = {"numbers": numbers, "signs": signs, "result": total}
        return Item(self.name, f"Work from left to right: {' '.join(chain)}\n", answer, meta)

    def check(self, item: Item, output: str) -> bool:
        """Right steps and right result; spaces at the ends of lines are forgiven."""
        return self.check_steps(item, output) and self.check_answer(item, output)

    def check_answer(self, item: Item, output: str) -> bool:
        """Whether the last line gives the result, however it was reached."""
        lines = output.strip().splitlines()
        return bool(lines) and lines[-1].strip() == f"Answer: {item.meta['result']}"

    def check_steps(self, item: Item, output: str) -> bool:
        """Whether the lines before the last are the chain's operations in order, each worked out correctly."""
        lines = [line.strip() for line in output.strip().splitlines()[:-1]]
        signs, numbers = item.meta["signs"], item.meta["numbers"]
        if len(lines) != len(signs):
            return False
        total = numbers[0]
        for line, sign, number in zip(lines, signs, numbers[1:], strict=True):
            found = _STEP.fullmatch(line)
            result = OPERATIONS[sign](total, number)
            if not found or found.groups() != (str(total), sign, str(number), str(result)):
                return False
            total = result
        return True
