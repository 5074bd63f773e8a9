"""Translation between invented languages: two that are known, and a third that is kept for fine-tuning."""

from __future__ import annotations

import random
from typing import ClassVar

from tunesmith.errors import RecipeError
from tunesmith.world.base import Family, Item, one_of, whole
from tunesmith.world.languages import NAMES, draw_sentence


class Translation(Family):
    """A sentence of one language said in another; both directions of a sentence are in the same split.

    `modifiers` is the largest number of adjectives and adverbs in a sentence; `source` and `target` fix the
    direction ("any" draws it).
    """

    name = "translation"
    summary = "between two invented languages with different word order"
    pretraining = True
    pairs: ClassVar[tuple[tuple[str, str], ...]] = (("Velic", "Orsan"), ("Orsan", "Velic"))

    def __init__(self, *, modifiers: int = 2, source: str = "any", target: str = "any") -> None:
        self.modifiers = whole(self.name, "modifiers", modifiers, 0, 3)
        self.source = one_of(self.name, "source", source, ("any", *NAMES))
        self.target = one_of(self.name, "target", target, ("any", *NAMES))
        self._pairs = [p for p in self.pairs if source in ("any", p[0]) and target in ("any", p[1])]
        if not self._pairs:
            offered = ", ".join(f"{a} to {b}" for a, b in self.pairs)
            raise RecipeError(f"{self.name}: there is no {source} to {target} here; there is {offered}.")

    def generate(self, rng: random.Random) -> Item:
        sentence = draw_sentence(rng, self.modifiers)
        source, target = rng.choice(self._pairs)
        meta = {"source": source, "target": target, "parts": sentence.parts()}
        return Item(self.name, f"{source} to {target}: {sentence.say(source)}\n", sentence.say(target), meta)

    def key(self, item: Item) -> str:
        """The meaning, so that no direction gives another away."""
        return "/".join(f"{letter}={concept}" for letter, concept in item.meta["parts"].items())


class ThirdLanguage(Translation):
    """From a known language into Kumbe, whose words and word order the embedded models were not shown."""

    name = "third_language"
    summary = "into a third language with its own words and word order"
    pretraining = False
    pairs = (("Velic", "Kumbe"), ("Orsan", "Kumbe"))

    def __init__(self, *, modifiers: int = 2, source: str = "Velic", target: str = "any") -> None:
        super().__init__(modifiers=modifiers, source=source, target=target)
