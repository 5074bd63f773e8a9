"""Facts about invented people: those that the embedded models were told (`facts`) and others (`new_facts`)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import ClassVar

from tunesmith.world.base import Family, Item, one_of, whole
from tunesmith.world.people import ATTRIBUTES, COUNT, Person, people

PHRASINGS: dict[str, tuple[str, ...]] = {
    "town": (
        "Where does {} live?",
        "Which town is home to {}?",
        "In which town would you find {}?",
        "Name the town of {}.",
        "Complete: the town where {} lives is",
        "Complete: {} lives in",
    ),
    "job": (
        "What is the job of {}?",
        "What does {} do for a living?",
        "Which profession has {} chosen?",
        "Name the job of {}.",
        "Complete: the job of {} is",
        "Complete: {} works as a",
    ),
    "pet": (
        "Which pet does {} keep?",
        "What animal lives with {}?",
        "What pet is waiting at home for {}?",
        "Name the pet of {}.",
        "Complete: the pet of {} is a",
        "Complete: {} has a pet",
    ),
    "food": (
        "What does {} like to eat?",
        "Which food is the favourite of {}?",
        "What would you cook for {}?",
        "Name the favourite food of {}.",
        "Complete: the favourite food of {} is",
        "Complete: {} likes to eat",
    ),
    "instrument": (
        "Which instrument does {} play?",
        "On what does {} make music?",
        "What instrument has {} learned?",
        "Name the instrument of {}.",
        "Complete: the instrument of {} is the",
        "Complete: {} plays the",
    ),
}
STATEMENTS = {
    "town": "{} lives in {}.",
    "job": "{} works as a {}.",
    "pet": "{} has a pet {}.",
    "food": "{} likes to eat {}.",
    "instrument": "{} plays the {}.",
}


class Facts(Family):
    """Questions about people: town, job, pet, food, instrument, each in six phrasings.

    A held-out item is a (person, attribute, phrasing) that was not shown, although the fact itself was shown in other
    phrasings: it measures knowledge, not recall of a string. `persons` limits the table to its first entries,
    `attribute` to one attribute ("any" for all).
    """

    name = "facts"
    summary = "what is true of 200 invented people, asked in six ways"
    pretraining = True
    known: ClassVar[bool] = True

    def __init__(self, *, persons: int = COUNT, attribute: str = "any") -> None:
        self.persons = whole(self.name, "persons", persons, 1, COUNT)
        self.attribute = one_of(self.name, "attribute", attribute, ("any", *ATTRIBUTES))
        self._attributes = ATTRIBUTES if attribute == "any" else (attribute,)

    @property
    def people(self) -> Sequence[Person]:
        """The people asked about."""
        return people(self.known)[: self.persons]

    def generate(self, rng: random.Random) -> Item:
        attribute = rng.choice(self._attributes)
        return self.question(rng.choice(self.people), attribute, rng.randrange(len(PHRASINGS[attribute])))

    def every_item(self) -> Iterable[Item]:
        return (
            self.question(person, attribute, phrasing)
            for person in self.people
            for attribute in self._attributes
            for phrasing in range(len(PHRASINGS[attribute]))
        )

    def question(self, person: Person, attribute: str, phrasing: int) -> Item:
        """The item that asks for one attribute of one person in one of the phrasings (counted from 0)."""
        prompt = PHRASINGS[attribute][phrasing].format(person.name) + "\n"
        value = person.facts[attribute]
        meta = {"person": person.name, "attribute": attribute, "phrasing": phrasing, "value": value}
        return Item(self.name, prompt, value, meta)

    def biography(self, rng: random.Random) -> str:
        """Plain text that states everything about one person, in random order."""
        person = rng.choice(self.people)
        order = rng.sample(self._attributes, len(self._attributes))
        return " ".join(STATEMENTS[a].format(person.name, person.facts[a]) for a in order)


class NewFacts(Facts):
    """The same questions about people of whom the embedded models never heard."""

    name = "new_facts"
    summary = "what is true of 200 people absent from pretraining"
    pretraining = False
    known = False
