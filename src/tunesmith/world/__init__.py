"""Seeded synthetic tasks with known answers, and real text that every machine has.

from tunesmith import world

family = world.get("sort", max_length=5)
items = family.items(100, split="heldout")
family.check(items[0], "a b c")
rows = world.dataset(["sort", "facts"], 1000, split="train", seed=0)     # prompt, completion, family
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RecipeError, did_you_mean
from tunesmith.world.arithmetic import Addition, Steps
from tunesmith.world.base import Family, Item, Split, knob_names
from tunesmith.world.boxes import Boxes
from tunesmith.world.facts import Facts, NewFacts
from tunesmith.world.intents import Intents
from tunesmith.world.procedures import Copy, Reverse, Rotate, Sort
from tunesmith.world.programs import Programs
from tunesmith.world.requests import Requests
from tunesmith.world.sentiment import Sentiment
from tunesmith.world.tools import Tools
from tunesmith.world.translation import ThirdLanguage, Translation

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Family", "Item", "Split", "classification_dataset", "dataset", "families", "get"]

_FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (
        Copy,
        Reverse,
        Sort,
        Addition,
        Facts,
        Sentiment,
        Translation,
        Steps,
        Rotate,
        ThirdLanguage,
        NewFacts,
        Boxes,
        Tools,
        Programs,
        Requests,
        Intents,
    )
}


def families(pretraining: bool | None = None) -> dict[str, type[Family]]:
    """Name -> family; only those shown in pretraining (True) or kept for fine-tuning (False) if asked."""
    return {n: f for n, f in _FAMILIES.items() if pretraining is None or f.pretraining == pretraining}


def get(name: str, **knobs: Any) -> Family:
    """The family called `name`, with its difficulty knobs.

    Raises:
        RecipeError: an unknown family, an unknown knob, or a knob out of its range.
    """
    if name not in _FAMILIES:
        raise RecipeError(
            f"There is no task family {name!r}.{did_you_mean(name, _FAMILIES)} There are: {', '.join(_FAMILIES)}."
        )
    family = _FAMILIES[name]
    known = knob_names(family)
    for knob in knobs:
        if knob not in known:
            raise RecipeError(
                f"{name} has no knob {knob!r}.{did_you_mean(knob, known)} It has: {', '.join(known) or 'none'}."
            )
    return family(**knobs)


def dataset(
    names: str | Sequence[str],
    n: int,
    *,
    split: Split = "train",
    seed: int = 0,
    chat: bool = False,
    knobs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Dataset:
    """`n` rows shared evenly among the families (the first ones take what is left over), in shuffled order.

    Args:
        names: one family or several.
        n: rows in all.
        chat: rows are (`messages`, `family`) instead of (`prompt`, `completion`, `family`).
        knobs: family -> its knobs.

    Raises:
        RecipeError: an unknown family or knob, or knobs for a family that is not in `names`.
        DataError: a family has too few distinct items.
    """
    import random

    from datasets import Dataset

    names = [names] if isinstance(names, str) else list(names)
    knobs = knobs or {}
    if not names:
        raise RecipeError("names must hold at least one task family, found none.")
    stray = [name for name in knobs if name not in names]
    if stray:
        raise RecipeError(f"knobs were given for {stray[0]!r}, which is not among the families {names}.")
    items: list[Item] = []
    for index, name in enumerate(names):
        share = n // len(names) + (index < n % len(names))
        items += get(name, **knobs.get(name, {})).items(share, split=split, seed=seed)
    random.Random(f"dataset/{seed}").shuffle(items)
    if chat:
        columns: dict[str, list[Any]] = {"messages": [item.messages() for item in items]}
    else:
        columns = {"prompt": [item.prompt for item in items], "completion": [item.answer for item in items]}
    return Dataset.from_dict({**columns, "family": [item.family for item in items]})


def classification_dataset(name: str, n: int, *, split: Split = "train", seed: int = 0, **knobs: Any) -> Dataset:
    """`n` rows (`text`, `label`) of "sentiment" or "intents"; `label` is a `ClassLabel`, in alphabetical order.

    Raises:
        RecipeError: the family is not a classification, or has no such knob.
        DataError: it has too few distinct items.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    family = get(name, **knobs)
    if not isinstance(family, (Sentiment, Intents)):
        raise RecipeError(f"{name!r} is not a classification; 'sentiment' and 'intents' are.")
    labels = ClassLabel(names=list(family.labels_used))
    items = family.items(n, split=split, seed=seed)
    rows = {"text": [item.meta["text"] for item in items], "label": [labels.str2int(item.answer) for item in items]}
    return Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": labels}))
