"""Difficulty knobs do what they say, and refuse what they cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith import world
from tunesmith.errors import RecipeError
from tunesmith.world.base import Item


def items(name: str, n: int = 60, **knobs: Any) -> list[Item]:
    return world.get(name, **knobs).items(n)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("copy", {"min_length": 0}),
        ("sort", {"max_length": 25}),
        ("sort", {"min_length": 9, "max_length": 3}),
        ("reverse", {"width": 5}),
        ("reverse", {"width": True}),
        ("addition", {"digits": 0}),
        ("addition", {"digits": "2"}),
        ("facts", {"persons": 201}),
        ("facts", {"attribute": "shoe"}),
        ("sentiment", {"clauses": 0}),
        ("sentiment", {"negation": 1}),
        ("translation", {"modifiers": 4}),
        ("translation", {"target": "Kumbe"}),
        ("third_language", {"source": "Kumbe"}),
        ("steps", {"operations": "+/"}),
        ("steps", {"operations": ""}),
        ("steps", {"min_terms": 5, "terms": 3}),
        ("rotate", {"procedures": ("sort", "shuffle")}),
        ("rotate", {"procedures": ()}),
        ("boxes", {"boxes": 1}),
        ("boxes", {"min_moves": 4, "moves": 2}),
        ("tools", {"tools": 7}),
        ("programs", {"tests": 0}),
        ("intents", {"labels": 1}),
        ("requests", {"declined": ()}),
        ("requests", {"declined": ("red", "blue", "green", "yellow", "white", "black")}),
        ("requests", {"declined": "pink"}),
    ],
)
def test_bad_knobs_name_the_family_the_knob_and_the_value(name: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as error:
        world.get(name, **knobs)
    message = str(error.value)
    assert message.startswith(name)
    assert any(str(value).strip("()") in message or knob in message for knob, value in knobs.items())


@pytest.mark.parametrize("name", sorted(world.families()))
def test_knobs_are_reported_and_rebuild_the_family(name: str) -> None:
    family = world.get(name)
    again = world.get(name, **family.knobs())
    assert again.items(5, seed=1) == family.items(5, seed=1)


@pytest.mark.parametrize("name", ["copy", "reverse", "sort", "rotate"])
def test_lengths_and_widths(name: str) -> None:
    lists = [item.meta["letters"] for item in items(name, min_length=2, max_length=3, width=2)]
    assert {len(letters) for letters in lists} == {2, 3}
    assert {len(word) for letters in lists for word in letters} == {2}
    assert all(len(set(letters)) == len(letters) for letters in lists)


def test_procedures() -> None:
    composed = items("rotate", procedures=("sort", "reverse"))
    assert all(item.answer.split() == sorted(item.meta["letters"], reverse=True) for item in composed)
    assert all(item.prompt.startswith("Sort, then reverse: ") for item in composed)
    for item in items("rotate", shift=2):
        letters, by = item.meta["letters"], item.meta["shift"]
        assert 1 <= by <= 2
        assert item.answer.split() == [letters[(i + by) % len(letters)] for i in range(len(letters))]


def test_addition_digits() -> None:
    for item in items("addition", digits=4):
        assert len(str(item.meta["a"])) == len(str(item.meta["b"])) == 4
        assert int(item.answer) == item.meta["a"] + item.meta["b"]


def test_both_orders_of_a_sum_share_their_split() -> None:
    family = world.get("addition")
    split = {(i.meta["a"], i.meta["b"]): family.split_of(i) for i in family.every_item() or ()}
    assert len(split) == 8100
    assert all(split[b, a] == where for (a, b), where in split.items())


def test_steps_knobs() -> None:
    for item in items("steps", min_terms=5, terms=6, largest=9, operations="*"):
        assert 5 <= len(item.meta["numbers"]) <= 6
        assert set(item.meta["signs"]) == {"*"}
        assert max(item.meta["numbers"]) <= 9


def test_facts_knobs() -> None:
    few = items("facts", persons=2, attribute="pet", n=9)
    assert {item.meta["attribute"] for item in few} == {"pet"}
    assert len({item.meta["person"] for item in few}) == 2


def test_sentiment_knobs() -> None:
    plain = [item.meta["text"] for item in items("sentiment", negation=False, contrast=False, clauses=3)]
    assert not any(" not " in text or " but " in text for text in plain)
    assert max(text.count(" and ") for text in plain) == 2


def test_translation_knobs() -> None:
    bare = items("translation", modifiers=0, source="Orsan")
    assert all(item.meta["source"] == "Orsan" and len(item.answer.split()) == 3 for item in bare)
    assert max(len(item.answer.split()) for item in items("translation", modifiers=3)) == 6


def test_boxes_knobs() -> None:
    for item in items("boxes", boxes=5, objects=4, min_moves=2, moves=2):
        assert item.prompt.count(" moves to ") == 2
        assert len(item.meta["start"]) == 4
        assert set(item.meta["end"].values()) <= set(range(1, 6))


def test_requests_follow_the_rule_and_half_are_declined() -> None:
    family = world.get("requests", declined=("blue", "green"))
    asked = family.items(200)
    for item in asked:
        assert item.meta["declined"] == (item.meta["colour"] in ("blue", "green")) == family.refused(item.answer)  # type: ignore[attr-defined]
    drawn = [next_item.meta["declined"] for next_item, _ in zip(family.stream(seed=1), range(400), strict=False)]
    assert 160 < sum(drawn) < 240


def test_intents_and_tools_limit_their_variety() -> None:
    assert {item.answer for item in items("intents", labels=3)} == {"alarm", "balance", "booking"}
    assert {item.meta["call"]["tool"] for item in items("tools", tools=2)} == {"timer", "weather"}
    assert len({item.meta["call"]["tool"] for item in items("tools", 100)}) == 6
