"""Small Python functions from a description and examples (kept for fine-tuning); the checker runs the code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.world._run import run
from tunesmith.world.base import Family, Item, whole

_LETTERS = "abcdefghilmnoprstu"
_WORDS = ("sun", "river", "stone", "a", "to", "garden", "moon", "tree", "of", "winter", "bell", "cloud")


def _number(rng: random.Random) -> int:
    return rng.randint(-20, 20)


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 15) for _ in range(rng.randint(0, 6))]


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, 5)))


@dataclass(frozen=True)
class _Template:
    """`{k}` and `{c}` stand for a number from 2 to 9 and a letter; `argument` draws a test input."""

    says: str
    parameter: str
    body: str
    argument: Callable[[random.Random], Any]


TEMPLATES = (
    _Template("Return n plus {k}.", "n", "n + {k}", _number),
    _Template("Return n times {k}.", "n", "n * {k}", _number),
    _Template("Return {k} minus n.", "n", "{k} - n", _number),
    _Template("Return whether n is divisible by {k}.", "n", "n % {k} == 0", _number),
    _Template("Return n, but at most {k}.", "n", "min(n, {k})", _number),
    _Template("Return n squared plus {k}.", "n", "n ** 2 + {k}", _number),
    _Template("Return the sum of xs plus {k}.", "xs", "sum(xs) + {k}", _numbers),
    _Template("Return the numbers in xs that are larger than {k}.", "xs", "[x for x in xs if x > {k}]", _numbers),
    _Template("Return how many numbers in xs are smaller than {k}.", "xs", "sum(x < {k} for x in xs)", _numbers),
    _Template("Return xs with every number times {k}.", "xs", "[x * {k} for x in xs]", _numbers),
    _Template("Return xs without the number {k}.", "xs", "[x for x in xs if x != {k}]", _numbers),
    _Template("Return the first {k} numbers of xs in sorted order.", "xs", "sorted(xs[:{k}])", _numbers),
    _Template("Return how often the letter {c} is in s.", "s", "s.count('{c}')", _sentence),
    _Template("Return s without the letter {c}.", "s", "s.replace('{c}', '')", _sentence),
    _Template(
        "Return the words of s that contain the letter {c}.", "s", "[w for w in s.split() if '{c}' in w]", _sentence
    ),
    _Template(
        "Return the words of s longer than {k} letters.", "s", "[w for w in s.split() if len(w) > {k}]", _sentence
    ),
    _Template("Return the last {k} letters of s in upper case.", "s", "s[-{k}:].upper()", _sentence),
    _Template("Return s repeated {k} times.", "s", "s * {k}", _sentence),
)


class Programs(Family):
    """Write a function `solve`. `examples` calls are shown, other calls are tested; `templates` limits the variety.

    The split is decided by the description, so a held-out item is a function that training did not show.
    """

    name = "programs"
    summary = "a small Python function; the checker runs it on hidden calls"
    pretraining = False

    def __init__(self, *, examples: int = 2, tests: int = 6, templates: int = len(TEMPLATES)) -> None:
        self.examples = whole(self.name, "examples", examples, 0, 5)
        self.tests = whole(self.name, "tests", tests, 1, 20)
        self.templates = whole(self.name, "templates", templates, 1, len(TEMPLATES))

    def generate(self, rng: random.Random) -> Item:
        template = rng.choice(TEMPLATES[: self.templates])
        filling = {"k": rng.randint(2, 9), "c": rng.choice(_LETTERS)}
        body = template.body.format(**filling)
        says = template.says.format(**filling)
        solve = eval(f"lambda {template.parameter}: {body}")
        arguments = [template.argument(rng) for _ in range(self.examples + self.tests)]
        shown, hidden = arguments[: self.examples], arguments[self.examples :]
        lines = [f"Write solve({template.parameter}). {says}"]
        lines += [f">>> solve({argument!r})\n{solve(argument)!r}" for argument in shown]
        answer = f"def solve({template.parameter}):\n    return {body}"
        meta = {"says": says, "calls": [[a] for a in hidden], "expected": [solve(a) for a in hidden]}
        return Item(self.name, "\n".join(lines) + "\n", answer, meta)

    def key(self, item: Item) -> str:
        """The description with its numbers and letters, whatever the examples."""
        return item.meta["says"]

    def check(self, item: Item, output: str) -> bool:
        """Whether the code defines a `solve` that returns what it should for the hidden calls."""
        return self.why_not(item, output) is None

    def why_not(self, item: Item, output: str) -> str | None:
        """What is wrong with the code, or None.

        Raises:
            DataError: this system cannot limit a process.
        """
        outcome = run(output, "solve", item.meta["calls"])
        if outcome.error is not None:
            return outcome.error
        results = outcome.results
        if not isinstance(results, list) or len(results) != len(item.meta["calls"]):
            return "gave no results"
        for (argument,), expected, found in zip(item.meta["calls"], item.meta["expected"], results, strict=True):
            # as text, because True == 1 == 1.0
            if json.dumps(found) != json.dumps(expected):
                return f"solve({argument!r}) gave {found!r}, expected {expected!r}"
        return None
