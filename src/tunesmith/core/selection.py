"""The data contract: a function from a `datasets.Dataset` to another, seeded, that keeps provenance.

Whatever a part returns has the columns of what it was given, and those named here: which row it came from, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import datasets
import numpy as np
from datasets import Dataset
from pydantic import Field

from tunesmith.errors import DataError

SOURCE = "source_index"
"""Column: the row's index in the data set that the part was given."""
SCORE = "selection_score"
"""Column: the score that the row was taken for; larger is better."""
STAGE = "selection_round"
"""Column: the round in which it was taken."""
CLUSTER = "selection_cluster"
"""Column: the cluster that it was taken from."""

Row = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row] | Dataset
Budget = Annotated[int, Field(strict=True, gt=0)] | Annotated[float, Field(gt=0, lt=1)]
"""How many rows a part keeps: a whole number of them, or a share of the data set below 1."""


@dataclass(frozen=True)
class Tuned:
    """A model trained on some rows, as a part may ask about it.

    Attributes:
        generate: `(rows) -> texts`, its own answer to each row's prompt.
        loss: `(rows) -> (N,)`, mean -log p per token of each row's completion; NaN where a row is so long that no
            token of its completion is left.
    """

    generate: Callable[[Rows], list[str]]
    loss: Callable[[Rows], np.ndarray]


@dataclass(frozen=True)
class Services:
    """What a part may ask of the model in whose training it chooses data; None where the caller offers none.

    Attributes:
        embed: `(rows) -> (N, D)` float32, one vector per row.
        fit: `(rows) -> Tuned`, trained from the base model by the run's own recipe.
        reward: `(prompts, answers) -> (N,)`, larger is better.
    """

    embed: Callable[[Rows], np.ndarray] | None = None
    fit: Callable[[Rows], Tuned] | None = None
    reward: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None

    def need(self, name: str, who: str, instead: str) -> Callable[..., Any]:
        """The service of that name.

        Args:
            name: `embed`, `fit` or `reward`.
            who: The part that asks, for the message.
            instead: What the user can do without it, as a sentence.

        Raises:
            DataError: the caller does not offer it.
        """
        found: Callable[..., Any] | None = getattr(self, name)
        if found is None:
            raise DataError(f"{who} needs the service `{name}`, which is not offered here. {instead}")
        return found


def take(
    dataset: Dataset,
    indices: Sequence[int],
    scores: Sequence[float] | None = None,
    rounds: Sequence[int] | None = None,
    clusters: Sequence[int] | None = None,
) -> Dataset:
    """The chosen rows in the order of `indices`, with their provenance.

    Raises:
        DataError: an index twice.
    """
    if len(set(indices)) != len(indices):
        raise DataError("a row was selected twice")
    columns = {SOURCE: indices, SCORE: scores, STAGE: rounds, CLUSTER: clusters}
    given = {name: list(values) for name, values in columns.items() if values is not None}
    chosen = dataset.remove_columns([name for name in given if name in dataset.column_names]).select(list(indices))
    with _quiet():
        for name, values in given.items():
            chosen = chosen.add_column(name, values)
    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets` inside the block."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def check_budget(budget: int, available: int, who: str) -> None:
    """Raise `DataError` unless 1 <= budget <= available."""
    if not 1 <= budget <= available:
        raise DataError(f"{who}: a budget of {budget} rows was asked for; the data set has {available}")


def budget_rows(budget: int | float, available: int, who: str) -> int:
    """A `Budget` in rows: a share is rounded to the nearest number of them, and to one at least.

    Raises:
        DataError: there are no rows, or fewer than the budget.
    """
    if not available:
        raise DataError(f"{who}: the data set is empty; there is nothing to select from")
    rows = max(round(budget * available), 1) if isinstance(budget, float) else budget
    check_budget(rows, available, who)
    return rows


def numbers(dataset: Dataset, column: str, who: str) -> np.ndarray:
    """A column as finite numbers, (N,) float64.

    Raises:
        DataError: there is no such column, or a row holds something else; names the row.
    """
    found = _array(dataset, column, who)
    if found.ndim != 1 or found.dtype.kind not in "iuf":
        raise DataError(f"{who}: column {column!r}: expected one number per row, found {dataset.features[column]}")
    _check_finite(found[:, None], f"{who}: column {column!r}")
    return found.astype(np.float64)


def vectors(dataset: Dataset, services: Services, column: str | None, who: str) -> np.ndarray:
    """One finite vector per row, (N, D) float32: those of a column, or the model's where `column` is None.

    Raises:
        DataError: there is no such column, its rows are no vectors of one length, or no model is offered.
    """
    if column is None:
        embed = services.need("embed", who, "Name a column of vectors by `embedding`.")
        found, what = np.asarray(embed(dataset)), f"{who}: the model's vectors"
    else:
        found, what = _array(dataset, column, who), f"{who}: column {column!r}"
    if found.ndim != 2 or found.dtype.kind not in "iuf" or len(found) != len(dataset):
        raise DataError(
            f"{what}: expected {len(dataset)} vectors of one length, found {found.dtype} of shape {found.shape}"
        )
    _check_finite(found, what)
    return found.astype(np.float32)


def _array(dataset: Dataset, column: str, who: str) -> np.ndarray:
    if column not in dataset.column_names:
        raise DataError(f"{who}: there is no column {column!r}; there are {', '.join(dataset.column_names)}")
    return dataset.select_columns([column]).with_format("numpy")[:][column]


def _check_finite(values: np.ndarray, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise DataError(f"{what}: row {bad[0]} is missing or not finite; so are {len(bad) - 1} others")


def prompt_of(row: Row) -> str:
    """What a row asks: its `prompt`, or the messages before the assistant's last.

    Raises:
        DataError: the row asks nothing.
    """
    if "messages" not in row:
        if "prompt" not in row:
            raise DataError(
                f"a row of {', '.join(row)} has no prompt that could be answered; expected prompt or messages"
            )
        return str(row["prompt"])
    before = row["messages"][: _last_answer(row)]
    if len(before) == 1:
        return str(before[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in before)


def answer_of(row: Row) -> str:
    """A row's own answer: its `completion`, or the assistant's last message."""
    return str(row["messages"][_last_answer(row)]["content"] if "messages" in row else row["completion"])


def with_answer(row: Row, answer: str) -> dict[str, Any]:
    """The row with another answer; what a conversation says after it is left out."""
    if "messages" not in row:
        return {**row, "completion": answer}
    at = _last_answer(row)
    return {**row, "messages": [*row["messages"][:at], {"role": "assistant", "content": answer}]}


def _last_answer(row: Row) -> int:
    turns = [i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
    if not turns:
        raise DataError("a conversation has no message of the assistant")
    return turns[-1]
