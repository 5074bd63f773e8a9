"""What somebody wants from an assistant, out of eight intents (kept for fine-tuning)."""

from __future__ import annotations

import random

from tunesmith.world.base import Family, Item, whole

_PLACES = ("the station", "the airport", "the museum", "the harbour", "the market", "the old bridge", "the library")
_TIMES = ("six", "seven", "half past eight", "nine", "noon", "four", "five", "midnight")
_PEOPLE = ("my sister", "my boss", "the doctor", "Anna", "Omar", "the neighbours", "my team")
_DAYS = ("today", "tomorrow", "on Monday", "on Friday", "this weekend", "next week")
_MUSIC = ("jazz", "some blues", "a waltz", "the new album", "piano music", "something slow", "an old song")
_SLOTS = {"place": _PLACES, "time": _TIMES, "person": _PEOPLE, "day": _DAYS, "music": _MUSIC}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "alarm": ("wake me at {time} {day}", "set an alarm for {time}", "I must be up by {time} {day}"),
    "balance": ("how much money do I have {day}", "can I still pay {person} {day}", "what is left on my account"),
    "booking": (
        "a table for {person} at {time}",
        "book dinner {day} at {time}",
        "reserve seats {day} near {place}",
    ),
    "message": ("tell {person} I am late", "write to {person} that I come {day}", "let {person} know about {place}"),
    "music": ("play {music}", "I want to hear {music} at {time}", "put on {music} for {person}"),
    "route": ("how do I get to {place}", "the way to {place} {day}", "guide {person} to {place} by {time}"),
    "ticket": ("buy a ticket to {place} {day}", "two fares to {place} at {time}", "a return to {place} for {person}"),
    "weather": ("will it rain {day}", "how warm is it at {place}", "does {person} need an umbrella {day}"),
}
OPENINGS = ("", "please, ", "hello, ", "quickly: ", "one thing: ")
LABELS = tuple(TEMPLATES)


class Intents(Family):
    """One of the first `labels` intents, in alphabetical order of the eight."""

    name = "intents"
    summary = "which of eight things somebody wants"
    pretraining = False

    def __init__(self, *, labels: int = 8) -> None:
        self.labels = whole(self.name, "labels", labels, 2, len(LABELS))

    @property
    def labels_used(self) -> tuple[str, ...]:
        """The labels, in alphabetical order."""
        return LABELS[: self.labels]

    def generate(self, rng: random.Random) -> Item:
        label = rng.choice(self.labels_used)
        filled = {slot: rng.choice(options) for slot, options in _SLOTS.items()}
        text = rng.choice(OPENINGS) + rng.choice(TEMPLATES[label]).format(**filled)
        return Item(self.name, f"Intent of: {text}\n", label, {"text": text})
