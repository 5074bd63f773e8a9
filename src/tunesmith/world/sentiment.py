"""Short reviews from a grammar, good or bad (pretraining)."""

from __future__ import annotations

import random

from tunesmith.errors import RecipeError
from tunesmith.world.base import Family, Item, whole

LABELS = ("negative", "positive")
SUBJECTS = (
    "soup", "bread", "film", "plot", "actor", "hotel", "room", "bed", "book", "ending", "song", "singer",
    "phone", "screen", "battery", "shop", "waiter", "coffee", "train", "seat", "garden", "museum", "guide", "cake",
)  # fmt: skip
WORDS = {
    "positive": (
        "good", "great", "lovely", "wonderful", "superb", "delightful", "excellent", "charming",
        "brilliant", "pleasant", "perfect", "fine", "splendid", "fresh", "impressive", "enjoyable",
    ),
    "negative": (
        "bad", "awful", "horrible", "dreadful", "poor", "dull", "terrible", "boring",
        "nasty", "ugly", "broken", "rude", "stale", "useless", "annoying", "unpleasant",
    ),
}  # fmt: skip
CLOSINGS = {
    "positive": (
        "I would come back.",
        "I recommend it.",
        "I loved it.",
        "We left happy.",
        "Worth every penny.",
    ),
    "negative": ("Never again.", "Avoid it.", "I want my money back.", "We left early.", "A waste of time."),
}
VERBS = ("was", "seemed", "felt", "is")


class Sentiment(Family):
    """One to `clauses` clauses about different things, and sometimes a closing sentence.

    With `negation` a word may be turned round by "not". With `contrast` the clause after "but" has the last word,
    whatever came before it; without it all clauses agree.
    """

    name = "sentiment"
    summary = "whether a short review is positive or negative"
    pretraining = True

    def __init__(self, *, clauses: int = 2, negation: bool = True, contrast: bool = True) -> None:
        self.clauses = whole(self.name, "clauses", clauses, 1, 4)
        for knob, value in (("negation", negation), ("contrast", contrast)):
            if not isinstance(value, bool):
                raise RecipeError(f"sentiment: {knob} must be true or false, found {value!r}.")
        self.negation, self.contrast = negation, contrast

    @property
    def labels_used(self) -> tuple[str, ...]:
        """The labels, in alphabetical order."""
        return LABELS

    def generate(self, rng: random.Random) -> Item:
        label = rng.choice(LABELS)
        text = self.review(rng, label)
        return Item(self.name, f"Is this review positive or negative? {text}\n", label, {"text": text})

    def review(self, rng: random.Random, label: str) -> str:
        """A review whose verdict is `label`."""
        count = rng.randint(1, self.clauses)
        contrast = self.contrast and count > 1 and rng.random() < 0.4
        other = LABELS[1 - LABELS.index(label)]
        subjects = rng.sample(SUBJECTS, count)
        early = other if contrast else label
        clauses = [self._clause(rng, subject, early) for subject in subjects[:-1]]
        last = self._clause(rng, subjects[-1], label)
        text = " and ".join(clauses)
        if clauses:
            text += ", but " if contrast else " and "
        text += last + "."
        if rng.random() < 0.5:
            text += " " + rng.choice(CLOSINGS[label])
        return text[0].upper() + text[1:]

    def _clause(self, rng: random.Random, subject: str, label: str) -> str:
        negated = self.negation and rng.random() < 0.25
        said = LABELS[1 - LABELS.index(label)] if negated else label
        return f"the {subject} {rng.choice(VERBS)} {'not ' if negated else ''}{rng.choice(WORDS[said])}"
