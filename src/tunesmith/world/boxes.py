"""Objects that are put in boxes and moved (kept for fine-tuning): who keeps track of what is where."""

from __future__ import annotations

import random

from tunesmith.errors import RecipeError
from tunesmith.world.base import Family, Item, whole

OBJECTS = (
    "apple", "book", "coin", "drum", "flag", "glove", "hat", "key", "lamp", "map", "pen", "ring",
)  # fmt: skip
EMPTY = "nothing"


class Boxes(Family):
    """`objects` things in `boxes` boxes, moved one at a time; the answer lists one box's content alphabetically.

    `min_moves` to `moves` things are moved. Moves are always possible, and an empty box holds "nothing".
    """

    name = "boxes"
    summary = "what a box holds after objects were moved"
    pretraining = False

    def __init__(self, *, boxes: int = 3, objects: int = 3, min_moves: int = 1, moves: int = 3) -> None:
        self.boxes = whole(self.name, "boxes", boxes, 2, 9)
        self.objects = whole(self.name, "objects", objects, 1, len(OBJECTS))
        self.min_moves = whole(self.name, "min_moves", min_moves, 0, 20)
        self.moves = whole(self.name, "moves", moves, 0, 20)
        if min_moves > moves:
            raise RecipeError(f"boxes: min_moves {min_moves} is larger than moves {moves}.")

    def generate(self, rng: random.Random) -> Item:
        things = rng.sample(OBJECTS, self.objects)
        place = {thing: rng.randint(1, self.boxes) for thing in things}
        start = dict(place)
        sentences = [f"The {thing} is in box {box}." for thing, box in place.items()]
        for _ in range(rng.randint(self.min_moves, self.moves)):
            thing = rng.choice(things)
            place[thing] = rng.choice([box for box in range(1, self.boxes + 1) if box != place[thing]])
            sentences.append(f"The {thing} moves to box {place[thing]}.")
        asked = rng.randint(1, self.boxes)
        content = sorted(thing for thing, box in place.items() if box == asked)
        prompt = f"{' '.join(sentences)} What is in box {asked}?\n"
        meta = {"start": start, "end": place, "asked": asked, "content": content}
        return Item(self.name, prompt, ", ".join(content) or EMPTY, meta)
