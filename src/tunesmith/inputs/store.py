"""Checked rows in an Arrow file: the second and last time that a source is read."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Json, List, Value
from datasets.arrow_writer import ArrowWriter

from tunesmith.inputs import images
from tunesmith.inputs.check import Checker
from tunesmith.inputs.columns import Meaning
from tunesmith.inputs.labels import accepted, class_names, numbers
from tunesmith.inputs.rows import BadRow, Problems, RawRows, RowError

WHERE = "where"
"""Column: the place of the row in its source."""
GROUP = "group"
"""Column: the row's `family`."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Rows:
    """The usable rows of one source, in our columns.

    Attributes:
        dataset: `text`; `prompt` and `completion`; `messages`, `tools` and `context`; or `label` with `text` or
            `image`. Each with `where`, and with `group` if the source has a family.
        keys: (N,) uint64, equal where rows are exact duplicates (their labels left out).
        labels: Class names, for a classification.
    """

    raw: RawRows
    meaning: Meaning
    dataset: Dataset
    keys: np.ndarray
    problems: Problems
    labels: list[str] | None

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        return replace(self, dataset=self.dataset.select(indices), keys=self.keys[np.asarray(indices, dtype=int)])


def scratch(folder: Path, name: str) -> str:
    """The path of a new file in `folder`."""
    return str(folder / f"{next(_numbers):04d}-{name}.arrow")


@contextmanager
def progress(verbose: bool) -> Iterator[None]:
    """Progress bars of `datasets` on or off inside the block."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if verbose else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def store(
    raw: RawRows, meaning: Meaning, folder: Path, *, config: Any = None, labels: Sequence[str] | None = None
) -> Rows:
    """Check every row and write the usable ones to `folder`.

    Args:
        config: The model's; its own classes come first.
        labels: The classes that are known already; rows of other classes are bad. None: found in the rows.

    Raises:
        DataError: bad rows that may not be skipped, or no usable row.
    """
    check = Checker(raw, meaning)
    problems = Problems(raw.problems.skip, list(raw.problems.rows))
    known = None if labels is None else accepted(labels)
    keys, found, given = array("Q"), array("q"), dict[str, int]()
    path = scratch(folder, "rows")
    with ArrowWriter(features=_features(meaning), path=path) as writer:
        for where, theirs in _entries(raw, meaning):
            try:
                row = check(theirs)
                content = _content(row, meaning, raw.folder)
                if "label" in row:
                    label = row.pop("label")
                    if known is not None and label not in known:
                        raise RowError("label", _unknown_class(meaning, label, labels or ()))
                    found.append(given.setdefault(label, len(given)))
            except RowError as bad:
                problems.add(bad.at(where))
                continue
            keys.append(int.from_bytes(blake2b(content, digest_size=8).digest(), "little"))
            writer.write({**row, WHERE: where})
        if keys:
            writer.finalize()
    problems.settle(raw.name, len(keys))
    dataset = Dataset.from_file(path)
    names: list[str] | None = None
    if "label" in meaning.shape:
        declared = raw.classes.get(meaning.theirs["label"])
        names = list(labels) if labels is not None else class_names(given, declared, config, raw.name)
        number = numbers(names, given)
        ids = np.array([number[label] for label in given], dtype=np.int64)[np.frombuffer(found, dtype=np.int64)]
        dataset = dataset.add_column("label", ids, feature=ClassLabel(names=names))
    return Rows(raw, meaning, dataset, np.frombuffer(keys, dtype=np.uint64), problems, names)


def _entries(raw: RawRows, meaning: Meaning) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in raw.read(list(dict.fromkeys(meaning.theirs.values()))):
        if not isinstance(entry, BadRow):
            yield entry


def _features(meaning: Meaning) -> Features:
    text = Value("string")
    if meaning.chat:
        columns: dict[str, Any] = {"messages": List(Json()), "context": Value("int32"), "tools": Json()}
    else:
        kinds = {"prompt": text, "completion": text, "text": text, "image": Image(decode=False)}
        columns = {field: kinds[field] for field in meaning.shape if field != "label"}
    if "family" in meaning.theirs:
        columns[GROUP] = text
    return Features({**columns, WHERE: text})


def _content(row: dict[str, Any], meaning: Meaning, folder: str | None) -> bytes:
    """What makes two rows duplicates; a picture is checked and put in the place of its path on the way."""
    if "image" in row:
        row["image"], content = images.check(row["image"], meaning.theirs["image"], folder)
        return content
    if "messages" in row:
        return json.dumps([row["messages"], row["tools"]], sort_keys=True).encode()
    return "\0".join(row[field] for field in meaning.shape if field != "label").encode()


def _unknown_class(meaning: Meaning, label: str, labels: Sequence[str]) -> str:
    few = f"{', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}"
    return f"field {meaning.theirs['label']!r}: {label!r} is not a class of the training rows ({few})"
