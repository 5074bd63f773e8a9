"""Rows to tokens, for each task: labels, limits, and a count of everything that was left out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, Value

from tunesmith.errors import DataError
from tunesmith.inputs.example import Example
from tunesmith.inputs.examples import Encoder
from tunesmith.inputs.limits import Limit
from tunesmith.inputs.rows import Problems, RowError
from tunesmith.inputs.store import GROUP, WHERE, scratch

_BATCH = 500
TooLong = Literal["drop", "truncate", "error"]


@dataclass
class Tally:
    """What happened to the rows of one source on their way to tokens."""

    lengths: array = field(default_factory=lambda: array("q"))
    kept: array = field(default_factory=lambda: array("q"))
    labelled: int = 0
    too_long: int = 0
    without_label: int = 0
    truncated: int = 0
    parted: int = 0
    longest: int = 0

    def summary(self) -> dict[str, Any]:
        """Counts, and percentiles of the lengths in tokens of the rows that are left, as plain data."""
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        percentiles = {f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in (0, 50, 90, 99, 100)}
        return {
            "rows": len(lengths),
            "tokens": int(lengths.sum()),
            "labelled_tokens": self.labelled,
            "lengths": percentiles,
            "longest_found": self.longest,
            "dropped_too_long": self.too_long,
            "dropped_without_label": self.without_label,
            "truncated": self.truncated,
            "tokenised_apart": self.parted,
        }


@dataclass
class Encode:
    """Encodes the rows of a source with one encoder and one limit.

    Attributes:
        encoder: Of the task.
        limit: In tokens.
        too_long: What happens to longer rows.
        folder: Where the result is written.
    """

    encoder: Encoder
    limit: Limit
    too_long: TooLong
    folder: Path

    def __call__(self, rows: Dataset, name: str, skip: bool) -> tuple[Dataset, Tally, Problems]:
        """(tokens, the tally, rows that could not be encoded).

        Raises:
            DataError: a row that is too long where that is an error, bad rows that may not be skipped, nothing left.
        """
        tally, problems = Tally(), Problems(skip)
        features = Features({**self.encoder.features, **({GROUP: Value("string")} if GROUP in rows.features else {})})

        def encode(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
            out: dict[str, list[Any]] = {column: [] for column in features}
            for at, found in enumerate(self.encoder.batch(batch)):
                where = batch[WHERE][at] if WHERE in batch else f"{name}, row {indices[at] + 1}"
                if isinstance(found, RowError):
                    problems.add(found.at(where))
                    continue
                row = self._fit(found, where, tally, problems)
                if row is not None:
                    tally.kept.append(indices[at])
                    if GROUP in features:
                        row[GROUP] = batch[GROUP][at]
                    for column, values in out.items():
                        values.append(row[column])
            return out

        tokens = rows.map(
            encode,
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=scratch(self.folder, "tokens"),
            load_from_cache_file=False,
            new_fingerprint=Path(scratch(self.folder, "fingerprint")).stem,
            desc=f"Tokens of {name}",
        )
        if not len(tokens):
            problems.settle(name, 1 if tally.too_long or tally.without_label else 0)
            raise DataError(
                f"{name}: no row is left. {tally.too_long} are longer than {self.limit.tokens} tokens "
                f"({self.limit.origin}), the longest has {tally.longest}; {tally.without_label} keep no label cut. "
                "Raise `data.max_length`, or set `data.too_long: truncate`."
            )
        problems.settle(name, len(tokens))
        return tokens, tally, problems

    def _fit(self, found: Example, where: str, tally: Tally, problems: Problems) -> dict[str, Any] | None:
        """The columns of a row within the limit; None if it is left out."""
        length = found.length
        tally.longest = max(tally.longest, length)
        if not found.labelled:
            problems.add(RowError("no-label", "no token of it carries loss, so that nothing can be learnt").at(where))
            return None
        if length > self.limit.tokens:
            if self.too_long == "error":
                raise DataError(
                    f"{where}: {length} tokens; at most {self.limit.tokens} are taken ({self.limit.origin}). Raise "
                    "`data.max_length`, shorten the row, or set `data.too_long` to drop or truncate."
                )
            if self.too_long == "drop":
                tally.too_long += 1
                return None
            found = self.encoder.cut(found, self.limit.tokens)
            if not found.labelled:
                tally.without_label += 1
                return None
            tally.truncated += 1
        tally.parted += found.parted
        tally.labelled += found.labelled
        tally.lengths.append(found.length)
        return found.columns()
