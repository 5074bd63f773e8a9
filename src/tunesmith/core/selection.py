"""The data contract: a function from a `datasets.Dataset` to another, seeded, that keeps provenance.

Whatever a part returns has the columns of what it was given, and those named here: which row it came from, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from tunesmith.errors import DataError

SOURCE = "source_index"
"""Column: the row's index in the data set that the part was given."""
SCORE = "selection_score"
"""Column: the score that the row was taken for; larger is better."""
STAGE = "selection_round"
"""Column: the round in which it was taken."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Tuned:
    """A model trained on some rows, as a part may ask about it.

    Attributes:
        generate: `(rows) -> texts`, its own answer to each row's prompt.
        loss: `(rows) -> (N,)`, mean -log p per token of each row's completion.
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


def take(
    dataset: Dataset, indices: Sequence[int], scores: Sequence[float] | None = None, rounds: Sequence[int] | None = None
) -> Dataset:
    """The chosen rows, with their provenance.

    Raises:
        DataError: an index twice.
    """
    if len(set(indices)) != len(indices):
        raise DataError("a row was selected twice")
    chosen = dataset.select(list(indices))
    for name, values in ((SOURCE, indices), (SCORE, scores), (STAGE, rounds)):
        if values is not None:
            chosen = chosen.remove_columns([name]) if name in chosen.column_names else chosen
            chosen = chosen.add_column(name, list(values))
    return chosen


def check_budget(budget: int, available: int, who: str) -> None:
    """Raise `DataError` unless 1 <= budget <= available."""
    if not 1 <= budget <= available:
        raise DataError(f"{who}: a budget of {budget} rows was asked for; the data set has {available}")
