"""Three invented languages: bijections of one lexicon, each with its own word order. A fixed table, by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from tunesmith.world.people import pick

CONCEPTS = {
    "noun": (
        "cat", "dog", "bird", "fish", "horse", "child", "king", "queen", "farmer", "sailor", "tree", "stone",
        "boat", "house",
    ),
    "verb": ("sees", "finds", "carries", "follows", "likes", "paints", "guards", "hears", "lifts", "leaves"),
    "adjective": ("red", "old", "small", "happy", "tall", "quiet", "strong", "clever"),
    "adverb": ("today", "often", "slowly", "again", "gladly", "never"),
}  # fmt: skip
NAMES = ("Velic", "Orsan", "Kumbe")

_SOUNDS = {
    "Velic": (("v", "l", "m", "s", "f", "n"), ("e", "i", "a", "ie"), ("n", "l", "r", "s", "")),
    "Orsan": (("d", "g", "b", "r", "z", "t"), ("o", "a", "u", "ou"), ("rk", "d", "g", "m", "")),
    "Kumbe": (("k", "p", "h", "w", "j", "ch"), ("u", "e", "o", "aa"), ("mb", "k", "p", "t", "")),
}
# S, V, O are subject, verb, object; a lower-case letter is the adjective of that noun, A the adverb.
_ORDERS = {"Velic": "AsSVoO", "Orsan": "SsOoAV", "Kumbe": "VASsOo"}


@dataclass(frozen=True)
class Sentence:
    """A meaning: English glosses of the parts; None where a modifier is absent."""

    subject: str
    verb: str
    object: str
    subject_adjective: str | None = None
    object_adjective: str | None = None
    adverb: str | None = None

    def parts(self) -> dict[str, str | None]:
        """The parts by the letters that the word orders use."""
        return {
            "S": self.subject,
            "V": self.verb,
            "O": self.object,
            "s": self.subject_adjective,
            "o": self.object_adjective,
            "A": self.adverb,
        }

    def say(self, language: str) -> str:
        """The sentence in one of `NAMES`."""
        words = lexicon(language)
        parts = self.parts()
        return " ".join(words[concept] for letter in _ORDERS[language] if (concept := parts[letter]))


@cache
def lexicon(language: str) -> dict[str, str]:
    """Concept -> word of one language; no word is shared between concepts or languages."""
    onsets, vowels, codas = _SOUNDS[language]
    rng = random.Random(f"lexicon of {language}")
    concepts = [concept for group in CONCEPTS.values() for concept in group]
    words: dict[str, None] = {}
    while len(words) < len(concepts):
        words[pick(rng, onsets) + pick(rng, vowels) + pick(rng, onsets) + pick(rng, vowels) + pick(rng, codas)] = None
    return dict(zip(concepts, words, strict=True))


def draw_sentence(rng: random.Random, modifiers: int) -> Sentence:
    """A sentence about two different things with 0 to `modifiers` (at most 3) adjectives and adverbs."""
    subject, object_ = rng.sample(CONCEPTS["noun"], 2)
    places = rng.sample(("s", "o", "A"), rng.randint(0, modifiers))
    return Sentence(
        subject=subject,
        verb=rng.choice(CONCEPTS["verb"]),
        object=object_,
        subject_adjective=rng.choice(CONCEPTS["adjective"]) if "s" in places else None,
        object_adjective=rng.choice(CONCEPTS["adjective"]) if "o" in places else None,
        adverb=rng.choice(CONCEPTS["adverb"]) if "A" in places else None,
    )
