"""Rows kept for evaluation: how many, which, and whether they are new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.conftest import pairs, prepare
from tunesmith.errors import DataError
from tunesmith.inputs import gather
from tunesmith.inputs.split import first
from tunesmith.recipe_fields import DataSpec

Write = Callable[..., str]


def sides(config: Any, **fields: Any) -> tuple[list[str], list[str]]:
    found = gather(DataSpec(**fields), config=config)
    return found.train.dataset["prompt"][:], found.eval.dataset["prompt"][:]


@pytest.mark.parametrize(
    ("rows", "fraction", "most", "held_out"), [(2, 0.01, 500, 1), (2, 0.99, 500, 1), (50, 0.1, 500, 5), (50, 0.5, 7, 7)]
)
def test_sizes(write: Write, lm: Any, rows: int, fraction: float, most: int, held_out: int) -> None:
    write("r.jsonl", pairs(rows))
    train, kept = sides(lm, train="r.jsonl", eval_fraction=fraction, max_eval_rows=most)
    assert len(kept) == held_out
    assert sorted(train + kept) == sorted(row["prompt"] for row in pairs(rows))


def test_the_seed_decides(write: Write, lm: Any) -> None:
    write("r.jsonl", pairs(60))
    again = [sides(lm, train="r.jsonl", split_seed=seed)[1] for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 5))
def test_drawn_rows_are_different_and_in_order(total: int, most: int, seed: int) -> None:
    drawn = first(total, most, seed).tolist()
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(total, most)
    assert all(0 <= at < total for at in drawn)


def test_one_row_is_too_few(write: Write, lm: Any) -> None:
    write("r.jsonl", pairs(1))
    with pytest.raises(
        DataError, match=r"r.jsonl has 1 usable row: too few to split off rows for evaluation. Give `data.ev"
    ):
        sides(lm, train="r.jsonl")


def test_given_evaluation_rows_are_all_taken(write: Write, lm: Any) -> None:
    write("r.jsonl", pairs(5))
    write("e.jsonl", pairs(9, 100))
    train, kept = sides(lm, train="r.jsonl", eval="e.jsonl", max_eval_rows=3)
    assert (len(train), len(kept)) == (5, 9)


def test_a_held_out_split_of_the_source_is_used_up_to_a_limit(write: Write, lm: Any, embedded: Any) -> None:
    write("other.txt", "")
    splits = DatasetDict(train=Dataset.from_list(pairs(5)), validation=Dataset.from_list(pairs(9, 100)))
    splits.save_to_disk("saved")
    assert len(sides(lm, train="saved")[1]) == 9
    train, kept = sides(lm, train="saved", max_eval_rows=4)
    assert (len(train), len(kept)) == (5, 4)
    assert kept != sides(lm, train="saved", max_eval_rows=4, split_seed=1)[1]
    report = prepare(lm, embedded, train="saved").report
    assert report["split"] == {"method": "saved/validation, at most 500 rows", "train": 5, "eval": 9}


def test_duplicates_are_counted(write: Write, lm: Any, embedded: Any) -> None:
    rows = pairs(6)
    write("r.jsonl", [*rows, rows[0], rows[0]])
    write("e.jsonl", [rows[1], rows[1], {**rows[2], "completion": "other"}, *pairs(2, 50)])
    report = prepare(lm, embedded, train="r.jsonl", eval="e.jsonl").report
    assert report["duplicates"] == {"within_train": 2, "eval_rows_in_train": 2}
