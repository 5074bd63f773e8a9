"""Invented people and what is true of them: a fixed table, the same on every machine and Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")

COUNT = 200  # people told of in pretraining, and as many who were not

SURNAMES = (
    "Abernal", "Bristow", "Calder", "Dunmore", "Ellery", "Fenwick", "Garland", "Hollis",
    "Ingram", "Jessop", "Kestrel", "Lomax", "Marlow", "Norwood", "Oakes", "Penrose",
)  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    "town": (
        "Tavro", "Ellmoor", "Quenby", "Sarnet", "Dunvale", "Orlix", "Brackwell", "Minford",
        "Halzen", "Pirna", "Westrow", "Korvane", "Lusk", "Yarrowby", "Zembla", "Fontaine",
    ),
    "job": (
        "baker", "pilot", "nurse", "farmer", "tailor", "judge", "plumber", "painter",
        "dentist", "miner", "sailor", "teacher", "potter", "waiter", "chemist", "guard",
    ),
    "pet": (
        "cat", "dog", "parrot", "rabbit", "turtle", "hamster", "goat", "pony",
        "ferret", "lizard", "goose", "duck", "snake", "mouse", "canary", "donkey",
    ),
    "food": (
        "soup", "rice", "cheese", "plums", "bread", "honey", "beans", "noodles",
        "olives", "pancakes", "melon", "cabbage", "peas", "cherries", "porridge", "walnuts",
    ),
    "instrument": (
        "violin", "piano", "flute", "drum", "harp", "trumpet", "guitar", "cello",
        "organ", "banjo", "oboe", "tuba", "lute", "fiddle", "zither", "bagpipe",
    ),
}  # fmt: skip
ATTRIBUTES = tuple(VALUES)

_ONSETS = (
    "B",
    "D",
    "F",
    "G",
    "J",
    "K",
    "L",
    "M",
    "N",
    "P",
    "R",
    "S",
    "T",
    "V",
    "Z",
    "Br",
    "Dr",
    "Kr",
    "Tr",
    "St",
)
_VOWELS = ("a", "e", "i", "o", "u")
_MIDDLES = ("l", "m", "n", "r", "s", "t", "v", "ld", "nd", "rn", "st")
_ENDINGS = ("a", "en", "is", "o", "or", "u", "il", "an", "eth", "ys")


@dataclass(frozen=True)
class Person:
    """A full name and one value for each of `ATTRIBUTES`. First names are never shared, surnames are."""

    name: str
    facts: dict[str, str]


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of `options` through `rng.random()` alone, whose sequence Python guarantees across versions."""
    return options[int(rng.random() * len(options))]


@cache
def people(known: bool) -> tuple[Person, ...]:
    """The `COUNT` people whom the embedded models were told of (`known`), or as many whom they never met."""
    rng = random.Random("people of the world")
    firsts: dict[str, None] = {}
    while len(firsts) < 2 * COUNT:
        firsts[pick(rng, _ONSETS) + pick(rng, _VOWELS) + pick(rng, _MIDDLES) + pick(rng, _ENDINGS)] = None
    everybody = [
        Person(f"{first} {pick(rng, SURNAMES)}", {a: pick(rng, VALUES[a]) for a in ATTRIBUTES}) for first in firsts
    ]
    return tuple(everybody[:COUNT] if known else everybody[COUNT:])
