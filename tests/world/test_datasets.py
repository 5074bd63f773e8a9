"""Rows for training: columns, shares, labels."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith import world
from tunesmith.errors import DataError, RecipeError
from tunesmith.world import images


def test_rows_are_shared_among_the_families() -> None:
    rows = world.dataset(["sort", "facts", "tools"], 20, seed=1, knobs={"sort": {"max_length": 4}})
    assert rows.column_names == ["prompt", "completion", "family"]
    assert {name: rows["family"].count(name) for name in ("sort", "facts", "tools")} == {
        "sort": 7,
        "facts": 7,
        "tools": 6,
    }
    assert rows["family"] != sorted(rows["family"])
    assert {len(row["completion"].split()) for row in rows if row["family"] == "sort"} == {4}
    again = world.dataset(["sort", "facts", "tools"], 20, seed=1, knobs={"sort": {"max_length": 4}})
    assert rows.to_list() == again.to_list()


def test_chat_rows() -> None:
    rows = world.dataset("addition", 3, chat=True, split="heldout")
    assert rows.column_names == ["messages", "family"]
    items = world.get("addition").items(3, split="heldout")
    assert {row["messages"][1]["content"] for row in rows} == {item.answer for item in items}
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]


def test_an_empty_dataset_keeps_its_columns() -> None:
    assert world.dataset("sort", 0).column_names == ["prompt", "completion", "family"]


def test_mistakes_in_a_dataset() -> None:
    with pytest.raises(RecipeError, match="at least one"):
        world.dataset([], 3)
    with pytest.raises(RecipeError, match="knobs were given for 'copy'"):
        world.dataset(["sort"], 3, knobs={"copy": {}})
    with pytest.raises(RecipeError, match="no knob"):
        world.dataset(["sort"], 3, knobs={"sort": {"depth": 1}})


@pytest.mark.parametrize(("name", "count"), [("sentiment", 2), ("intents", 8)])
def test_classification_rows(name: str, count: int) -> None:
    rows = world.classification_dataset(name, 200, split="train", seed=2)
    assert rows.column_names == ["text", "label"]
    labels = rows.features["label"]
    assert labels.num_classes == count == len(set(rows["label"]))
    items = world.get(name).items(200, seed=2)
    assert [labels.int2str(label) for label in rows["label"]] == [item.answer for item in items]
    assert rows["text"][0] == items[0].meta["text"]


def test_classification_knobs_and_mistakes() -> None:
    assert world.classification_dataset("intents", 10, labels=3).features["label"].num_classes == 3
    with pytest.raises(RecipeError, match="'sort' is not a classification"):
        world.classification_dataset("sort", 3)


def test_digits_are_split_once_and_for_all() -> None:
    train, train_labels = images.digits("train")
    heldout, heldout_labels = images.digits("heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    assert train.dtype == np.uint8
    assert (train.min(), train.max()) == (0, 255)
    assert set(train_labels) == set(heldout_labels) == set(range(10))
    with pytest.raises(DataError, match="digits: the split"):
        images.digits("test")  # type: ignore[arg-type]


def test_image_rows() -> None:
    rows = images.image_dataset(5, split="heldout", seed=1)
    assert rows[0]["image"].size == (8, 8)
    pixels, labels = images.digits("heldout")
    found = [int(np.flatnonzero((pixels == np.array(row["image"])).all((1, 2)))[0]) for row in rows]
    assert [row["label"] for row in rows] == [int(labels[i]) for i in found]
    assert rows.to_dict()["label"] == images.image_dataset(5, split="heldout", seed=1).to_dict()["label"]
    with pytest.raises(DataError, match="361 heldout images"):
        images.image_dataset(361, split="heldout")
