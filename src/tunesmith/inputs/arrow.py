"""Rows that come with a schema: `datasets.Dataset`, Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Json, Value
from datasets.features import LargeList, List

from tunesmith.errors import DataError
from tunesmith.inputs.rows import Entry, Problems, RawRows

_BATCH = 1000


def of_dataset(dataset: Dataset, name: str, what: str, skip: bool, folder: str | None = None) -> RawRows:
    """The rows of a `datasets.Dataset`, whatever format it was set to.

    Raises:
        DataError: it is empty.
    """
    if not len(dataset):
        raise DataError(f"{name} is empty: it has no rows.")
    plain = _undecoded(dataset.with_format(None))

    def read(columns: Sequence[str]) -> Iterator[Entry]:
        for number, row in enumerate(_rows(plain.select_columns(list(columns))), 1):
            yield f"{name}, row {number}", row

    return _raw(plain.features, len(plain), name, what, skip, read, folder)


def of_arrow_file(path: Path, name: str, what: str, skip: bool) -> RawRows:
    """The rows of one Arrow file, as `datasets` writes them."""
    return of_dataset(Dataset.from_file(str(path)), name, what, skip, str(path.parent))


def of_parquet(path: Path, name: str, what: str, skip: bool) -> RawRows:
    """The rows of a Parquet file, read in pieces.

    Raises:
        DataError: it is empty.
    """
    with pq.ParquetFile(path) as file:
        count, features = file.metadata.num_rows, Features.from_arrow_schema(file.schema_arrow)
    if not count:
        raise DataError(f"{name} is empty: it has no rows.")

    def read(columns: Sequence[str]) -> Iterator[Entry]:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=list(columns)):
                for row in _rows(_undecoded(Dataset(pa.Table.from_batches([batch])))):
                    number += 1
                    yield f"{name}, row {number}", row

    return _raw(features, count, name, what, skip, read, str(path.parent))


def _raw(features: Features, count: int, name: str, what: str, skip: bool, read: Any, folder: str | None) -> RawRows:
    columns = {column: _kind(feature) for column, feature in features.items()}
    classes = {column: list(f.names) for column, f in features.items() if isinstance(f, ClassLabel)}
    return RawRows(name, what, columns, count, Problems(skip), read, classes, True, folder)


def _undecoded(dataset: Dataset) -> Dataset:
    """Pictures stay bytes or paths until a batch needs them."""
    for column, feature in dataset.features.items():
        if isinstance(feature, Image) and feature.decode:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(_BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _kind(feature: Any) -> str:
    if isinstance(feature, Value):
        words = {"string": "text", "large_string": "text", "bool": "true or false"}
        return words.get(
            feature.dtype, "a number" if "int" in feature.dtype or "float" in feature.dtype else feature.dtype
        )
    if isinstance(feature, List | LargeList | list):
        return "a list"
    if isinstance(feature, Image):
        return "an image"
    if isinstance(feature, ClassLabel):
        return "a class"
    return (
        "anything"
        if isinstance(feature, Json)
        else "an object"
        if isinstance(feature, dict)
        else type(feature).__name__
    )
