"""Reading one file: which format it has, by its ending."""

from __future__ import annotations

import codecs
from pathlib import Path

import pyarrow as pa

from tunesmith.errors import DataError
from tunesmith.inputs.arrow import of_arrow_file, of_parquet
from tunesmith.inputs.csv_rows import csv_rows
from tunesmith.inputs.files import opened
from tunesmith.inputs.json_rows import json_rows
from tunesmith.inputs.rows import RawRows, first_line, survey

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def suffix(path: Path) -> str:
    """The ending that tells the format, `.gz` left out."""
    name = path.name.lower().removesuffix(".gz")
    return next((end for end in SUFFIXES if name.endswith(end)), "")


def read_file(path: Path, name: str, what: str, skip: bool) -> RawRows:
    """The rows of one file.

    Raises:
        DataError: an ending that is not known, a file that is not what its ending says, or unreadable rows.
    """
    end = suffix(path)
    packed = path.name.lower().endswith(".gz")
    if not end or (packed and end not in TEXT_SUFFIXES):
        raise DataError(
            f"{what}: {name} has an ending that is not known. Rows are read from {', '.join(SUFFIXES)} (text formats "
            'also with .gz). Plain text becomes JSON lines, one `{"text": "..."}` a line.'
        )
    if end in TEXT_SUFFIXES:
        with opened(path, name) as file:
            start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
        if not start.strip():
            raise DataError(f"{name} is empty: it has no rows.")
        if start.startswith(_UTF16):
            raise DataError(f"{name} is UTF-16 text; UTF-8 is expected. `iconv -f UTF-16 -t UTF-8` converts it.")
        table = end in (".csv", ".tsv")
        reader = csv_rows(path, name, start, end == ".tsv") if table else json_rows(path, name)
        return survey(name, what, skip, reader, folder=str(path.parent))
    try:
        read = of_parquet if end == ".parquet" else of_arrow_file
        return read(path, name, what, skip)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as {end[1:].capitalize()}: {first_line(error)}") from None
