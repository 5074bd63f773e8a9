"""Which number each class gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig

from tests.inputs.conftest import prepare
from tunesmith.errors import DataError
from tunesmith.inputs.labels import accepted, class_names, numbers

Write = Callable[..., str]
TEN = BertConfig(id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)})
MOODS = BertConfig(id2label={0: "POS", 1: "NEG"}, label2id={"POS": 0, "NEG": 1})
BLANK = BertConfig(num_labels=2)


@pytest.mark.parametrize(
    ("found", "declared", "config", "names"),
    [
        (["b", "a", "c"], None, BLANK, ["a", "b", "c"]),
        (["10", "9", "-1"], None, BLANK, ["-1", "9", "10"]),
        (["1", "b"], None, BLANK, ["1", "b"]),
        (["a", "b"], ["z", "b", "a"], BLANK, ["z", "b", "a"]),
        (["NEG", "POS"], None, MOODS, ["POS", "NEG"]),
        (["NEG", "POS"], ["NEG", "POS"], MOODS, ["POS", "NEG"]),
        (["0", "1"], None, MOODS, ["POS", "NEG"]),
        (["0", "1"], ["0", "1"], MOODS, ["0", "1"]),
        (["0", "2"], None, MOODS, ["0", "2"]),
        (["3", "7"], None, TEN, [str(i) for i in range(10)]),
    ],
)
def test_order(found: list[str], declared: list[str] | None, config: Any, names: list[str]) -> None:
    assert class_names(found, declared, config, "rows") == names


def test_one_class_is_none() -> None:
    with pytest.raises(
        DataError, match=r"rows: every row has the label 'a'; a classification needs two classes or more"
    ):
        class_names(["a"], None, BLANK, "rows")


def test_numbers_stand_for_names_unless_they_are_names() -> None:
    assert numbers(["POS", "NEG"], ["0", "NEG"]) == {"0": 0, "NEG": 1}
    assert numbers(["1", "0"], ["0", "1"]) == {"0": 1, "1": 0}
    assert accepted(["POS", "NEG"]) == {"POS", "NEG", "0", "1"}
    assert accepted(["1", "2"]) == {"1", "2"}


@pytest.mark.parametrize("labels", [["no", "yes"], [0, 1], ["0", "1"], [False, True], [5, 7], [1.0, 2.0]])
def test_labels_of_rows(write: Write, bert: Any, embedded: Any, labels: list[Any]) -> None:
    write("r.jsonl", [{"text": f"text {i}", "label": labels[i % 2]} for i in range(10)])
    found = prepare(bert, embedded, train="r.jsonl")
    words = [str(x).lower() if isinstance(x, bool) else str(int(x)) if isinstance(x, float) else str(x) for x in labels]
    assert found.labels == words
    for tokens, row in zip(found.eval, found.rows["eval"], strict=True):
        assert found.labels[tokens["labels"]] == words[int(row["text"].split()[1]) % 2]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (0.5, "expected a class name or a whole number, found 0.5"),
        (["a"], "expected a class name or a whole number, found a list"),
        (None, "expected a class name or a whole number, found null"),
        ("  ", "expected text, found only white space"),
    ],
)
def test_labels_that_are_none(write: Write, bert: Any, embedded: Any, label: Any, reason: str) -> None:
    write("r.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": label}, {"text": "c", "label": "y"}])
    with pytest.raises(DataError, match=f"r.jsonl:2: field 'label': {reason}"):
        prepare(bert, embedded, train="r.jsonl")


def test_declared_classes(write: Write, bert: Any, embedded: Any) -> None:
    write("other.txt", "")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "unused", "a"])})
    rows = {"text": [f"text {i}" for i in range(8)], "label": [0, 2] * 4}
    Dataset.from_dict(rows, features=features).to_parquet("r.parquet")
    found = prepare(bert, embedded, train="r.parquet")
    assert found.labels == ["z", "unused", "a"]
    assert set(found.train["labels"]) == {0, 2}
    without = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    DatasetDict(train=Dataset.from_dict(rows, features=features), test=without).save_to_disk("saved")
    with pytest.raises(DataError, match=r"saved/test, row 1: .* from 0 to 2, found -1 \(a row without a label\)"):
        prepare(bert, embedded, train="saved")


def test_evaluation_rows_of_an_unknown_class(write: Write, bert: Any, embedded: Any, tmp_path: Path) -> None:
    write("r.jsonl", [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(4)])
    write("e.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(DataError, match=r"e.jsonl:2: field 'label': 'z' is not a class of the training rows \(x, y\)"):
        prepare(bert, embedded, train="r.jsonl", eval="e.jsonl")
    found = prepare(bert, embedded, train="r.jsonl", eval="e.jsonl", skip_bad_rows=True)
    assert found.report["sources"]["eval"]["bad_rows"]["kinds"] == {"label": 1}


def test_a_head_with_other_classes_is_told(write: Write, embedded: Any) -> None:
    config = BertConfig(
        architectures=["BertForSequenceClassification"], id2label=MOODS.id2label, label2id=MOODS.label2id
    )
    write("r.jsonl", [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(4)])
    notes = prepare(config, embedded, train="r.jsonl").report["notes"]
    assert "the model's head tells POS, NEG apart; these classes need a new one" in notes
    write("r.jsonl", [{"text": f"a {i}", "label": ["POS", "NEG"][i % 2]} for i in range(4)])
    assert prepare(config, embedded, train="r.jsonl").report["notes"] == []
