"""Which rows are kept for evaluation, and whether they are really new to the model."""

from __future__ import annotations

import numpy as np

from tunesmith.errors import DataError
from tunesmith.inputs.store import Rows


def split(rows: Rows, fraction: float, most: int, seed: int) -> tuple[Rows, Rows]:
    """(training rows, evaluation rows), both in the order of the source; the same for the same seed.

    Raises:
        DataError: there is no row for one of the sides.
    """
    total = len(rows.dataset)
    if total < 2:
        raise DataError(
            f"{rows.raw.name} has {total} usable row: too few to split off rows for evaluation. Give `data.eval`."
        )
    held_out = first(total, min(most, max(1, round(total * fraction)), total - 1), seed)
    kept = np.setdiff1d(np.arange(total), held_out)
    return rows.select(kept), rows.select(held_out)


def first(total: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of `total` indices, drawn with `seed`, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:most])


def duplicates(train: Rows, held_out: Rows) -> dict[str, int]:
    """Exact repetitions, labels left out: of rows within `train`, and of rows of `train` in `held_out`."""
    return {
        "within_train": int(len(train.keys) - len(np.unique(train.keys))),
        "eval_rows_in_train": int(np.isin(held_out.keys, train.keys).sum()),
    }
