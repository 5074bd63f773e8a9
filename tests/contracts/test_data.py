"""The data contract, for every part of the room, and the helpers that parts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
import pytest
from datasets import Dataset

from tunesmith import catalog
from tunesmith.core.part import Part
from tunesmith.core.selection import (
    SOURCE,
    Budget,
    Rows,
    Services,
    Tuned,
    answer_of,
    budget_rows,
    numbers,
    prompt_of,
    take,
    vectors,
    with_answer,
)
from tunesmith.errors import DataError, RecipeError

PARTS = pytest.mark.parametrize("part", catalog.in_room("data"), ids=lambda p: p.slug)
SELECTORS = pytest.mark.parametrize(
    "part", [p for p in catalog.in_room("data") if "budget" in p.options], ids=lambda p: p.slug
)
"""Parts that keep a number of the rows as they are, instead of making others."""
SERVICES = ("embed", "fit", "reward")


def table(rows: int = 40, distinct: int | None = None) -> Dataset:
    """Rows of which `distinct` differ, with a column that no part knows."""
    of = [i % (distinct or rows or 1) for i in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [f"question {i} {'abc'[i % 3] * (i % 7)}\n" for i in of],
            "completion": [f"answer {i}" for i in of],
            "kept": [[i, i + 1] for i in of],
        }
    )


def stub(**changes: Any) -> Services:
    """Services without a model: vectors of letter counts, answers and losses of word lengths."""

    def embed(rows: Rows) -> np.ndarray:
        texts = [f"{row['prompt']}{row['completion']}" for row in rows]
        return np.array([[text.count(c) for c in "abc0123456789"] for text in texts], dtype=np.float32)

    def fit(rows: Rows) -> Tuned:
        seen = len(rows)
        return Tuned(
            generate=lambda asked: [row["completion"][: 3 + seen % 4] for row in asked],
            loss=lambda asked: np.array([len(row["completion"]) / 10 for row in asked]),
        )

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([len(answer) / 5 for answer in answers])

    return dataclasses.replace(Services(embed, fit, reward), **changes)


def run(part: Part, rows: Dataset, services: Services | None = None, **options: Any) -> Dataset:
    options = {name: value for name, value in options.items() if name in part.options}
    return part.target(rows, services or stub(), **part.validate(options))


def same(a: Dataset, b: Dataset) -> bool:
    return a.column_names == b.column_names and a.to_list() == b.to_list()


@PARTS
def test_same_seed_same_rows_and_another_seed_others(part: Part) -> None:
    first, again = (run(part, table(), budget=10, seed=3) for _ in range(2))
    assert same(first, again)
    if "seed" in part.options:
        assert not same(first, run(part, table(), budget=10, seed=4))


@PARTS
def test_the_global_random_state_does_not_matter_and_is_not_touched(part: Part) -> None:
    np.random.seed(0)
    expected = np.random.RandomState(0).rand()
    first = run(part, table(), budget=10)
    assert np.random.rand() == expected
    assert same(first, run(part, table(), budget=10))


@SELECTORS
@pytest.mark.parametrize("budget", [1, 2, 7, 39, 40, 0.05, 0.5, 0.999])
def test_the_budget_is_met_exactly(part: Part, budget: int | float) -> None:
    chosen = run(part, table(), budget=budget)
    assert len(chosen) == (budget if isinstance(budget, int) else round(40 * budget))
    assert len(set(chosen[SOURCE])) == len(chosen)


@SELECTORS
@pytest.mark.parametrize("budget", [0, -1, 1.0, 1.5, 0.0, True])
def test_a_budget_that_is_neither_rows_nor_a_share_is_refused(part: Part, budget: object) -> None:
    with pytest.raises(RecipeError, match="budget"):
        run(part, table(), budget=budget)


@SELECTORS
def test_a_budget_above_the_rows_is_refused(part: Part) -> None:
    with pytest.raises(DataError, match=rf"{part.slug}.*41.*40"):
        run(part, table(), budget=41)


@PARTS
def test_no_rows_are_a_clear_error(part: Part) -> None:
    with pytest.raises(DataError, match=rf"{part.slug}.*empty"):
        run(part, table().select([]))


@SELECTORS
def test_a_single_row_is_taken(part: Part) -> None:
    assert run(part, table(1), budget=1)[SOURCE] == [0]
    assert run(part, table(1))[SOURCE] == [0]


@SELECTORS
@pytest.mark.parametrize("distinct", [1, 2])
def test_duplicate_rows_are_rows(part: Part, distinct: int) -> None:
    chosen = run(part, table(30, distinct), budget=11)
    assert len(set(chosen[SOURCE])) == 11


@SELECTORS
def test_rows_are_those_of_the_source_with_all_their_columns(part: Part) -> None:
    rows = table().add_column(SOURCE, [7] * 40).select(range(39, -1, -1))
    chosen = run(part, rows, budget=13)
    own = [name for name in rows.column_names if name != SOURCE]
    assert all(chosen.features[name] == rows.features[name] for name in own)
    for row in chosen:
        assert {name: row[name] for name in own} == {name: rows[row[SOURCE]][name] for name in own}


@PARTS
def test_the_source_is_not_changed(part: Part) -> None:
    rows = table()
    run(part, rows, budget=10)
    assert same(rows, table())


@PARTS
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_is_needed_and_not_offered_is_named(part: Part, name: str) -> None:
    asked = set()

    def watched(service: str) -> Any:
        def call(*given: Any) -> Any:
            asked.add(service)
            return getattr(stub(), service)(*given)

        return call

    expected = run(part, table(), Services(**{service: watched(service) for service in SERVICES}), budget=10)
    if name not in asked:
        assert same(run(part, table(), stub(**{name: None}), budget=10), expected)
        return
    with pytest.raises(DataError, match=rf"{part.slug} needs the service `{name}`"):
        run(part, table(), stub(**{name: None}), budget=10)


def test_some_part_asks_for_something() -> None:
    """The test above says something."""
    with pytest.raises(DataError, match="embed"):
        run(catalog.get("diversify-conquer"), table(), Services(), rounds=1)


def test_provenance_columns_replace_older_ones() -> None:
    twice = take(take(table(), [5, 9, 2], [0.1, 0.2, 0.3], [0, 0, 1], [4, 4, 1]), [2, 0])
    assert twice[SOURCE] == [2, 0]
    assert twice["selection_score"] == [0.3, 0.1]
    assert twice["selection_round"] == [1, 0]
    assert twice["selection_cluster"] == [1, 4]
    assert twice["prompt"] == [table()[2]["prompt"], table()[5]["prompt"]]


def test_a_row_is_never_taken_twice() -> None:
    with pytest.raises(DataError, match="twice"):
        take(table(), [1, 1])


@pytest.mark.parametrize(("budget", "rows"), [(1, 1), (10, 10), (0.25, 2), (0.05, 1), (0.99, 10), (0.999999, 10)])
def test_a_share_is_rounded_and_never_to_nothing(budget: int | float, rows: int) -> None:
    assert pydantic.TypeAdapter(Budget).validate_python(budget) == budget
    assert budget_rows(budget, 10, "x") == rows


COLUMNS = Dataset.from_dict(
    {
        "number": [1.5, -2.0, 3.0],
        "whole": [1, 2, 3],
        "hole": [1.0, None, 2.0],
        "text": ["a", "b", "c"],
        "truth": [True, False, True],
        "vector": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
        "ragged": [[1.0], [1.0, 2.0], [1.0]],
        "gap": [[1.0, 2.0], [None, 4.0], [5.0, 6.0]],
    }
)


@pytest.mark.parametrize("column", ["number", "whole"])
def test_numbers_of_a_column(column: str) -> None:
    found = numbers(COLUMNS.select([2, 0]), column, "x")
    assert found.dtype == np.float64
    assert found.tolist() == [COLUMNS[column][2], COLUMNS[column][0]]


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ("nowhere", "x: there is no column 'nowhere'; there are number"),
        ("hole", "'hole': row 1 is missing"),
        ("text", "'text': expected one number per row"),
        ("truth", "'truth': expected one number per row"),
        ("vector", "'vector': expected one number per row"),
    ],
)
def test_what_is_no_number_is_named(column: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        numbers(COLUMNS, column, "x")


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ("nowhere", "no column 'nowhere'"),
        ("number", "'number': expected 3 vectors"),
        ("ragged", "'ragged': expected 3 vectors of one length"),
        ("gap", "'gap': row 1 is missing"),
        ("text", "'text': expected 3 vectors"),
    ],
)
def test_what_is_no_vector_is_named(column: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        vectors(COLUMNS, Services(), column, "x")


def test_vectors_come_from_a_column_or_from_the_model() -> None:
    found = vectors(COLUMNS, Services(), "vector", "x")
    assert found.dtype == np.float32
    assert found.tolist() == COLUMNS["vector"][:]
    assert vectors(COLUMNS, Services(embed=lambda rows: np.eye(3)), None, "x").tolist() == np.eye(3).tolist()
    with pytest.raises(DataError, match="model's vectors: expected 3"):
        vectors(COLUMNS, Services(embed=lambda rows: np.eye(2)), None, "x")


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Thanks."},
]


def test_prompt_and_answer_of_a_row_and_another_answer() -> None:
    pair = {"prompt": "1 + 1\n", "completion": "2", "where": "a:1"}
    assert (prompt_of(pair), answer_of(pair)) == ("1 + 1\n", "2")
    assert with_answer(pair, "3") == {**pair, "completion": "3"}
    chat = {"messages": CHAT, "where": "a:2"}
    assert prompt_of(chat) == "system: Be brief.\nuser: One?\nassistant: 1\nuser: Two?"
    assert answer_of(chat) == "2"
    assert with_answer(chat, "3") == {"messages": [*CHAT[:4], {"role": "assistant", "content": "3"}], "where": "a:2"}
    assert chat["messages"][4]["content"] == "2"
    assert prompt_of({"messages": CHAT[1:3]}) == "One?"


def test_rows_that_ask_or_answer_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="text has no prompt"):
        prompt_of({"text": "abc"})
    with pytest.raises(DataError, match="no message of the assistant"):
        answer_of({"messages": CHAT[:2]})
