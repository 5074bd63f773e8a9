"""CSV and TSV, row by row."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.inputs.files import lines, not_utf8
from tunesmith.inputs.rows import BadRow, Entry

_UNDECODED = re.compile("[\udc80-\udcff]")


def csv_rows(path: Path, name: str, start: bytes, tabs: bool) -> Callable[[Sequence[str]], Iterator[Entry]]:
    """A reader of a file that begins with `start`; a header without commas may separate by `;` or tabs.

    Raises:
        DataError: from the reader, on a header that is not CSV or names a column twice.
    """
    header = start.lstrip().partition(b"\n")[0]
    mark = "\t" if tabs else ","
    if not tabs and b"," not in header and (b";" in header or b"\t" in header):
        mark = ";" if b";" in header else "\t"
    return lambda _: _cells(path, name, mark)


def _cells(path: Path, name: str, mark: str) -> Iterator[Entry]:
    # Bytes that are not UTF-8 pass as lone surrogates, so that the parser goes on and the row can be named.
    decoded = (line.decode("utf-8", "surrogateescape") for _, line in lines(path, name))
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader(decoded, delimiter=mark, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{where}: the header is not CSV: {error}.") from None
            yield BadRow(where, "unreadable", f"not CSV: {error} (a text with quotes doubles them and is quoted)")
            continue
        if not cells:
            continue
        if header is None:
            header = _header(cells, where)
        elif any(_UNDECODED.search(cell) for cell in cells):
            yield BadRow(where, "encoding", not_utf8(_decode_error(cells)))
        elif len(cells) != len(header):
            yield BadRow(
                where,
                "unreadable",
                f"expected {len(header)} cells as in the header ({', '.join(header)}), found {len(cells)}; texts that "
                f"hold {'a tab' if mark == chr(9) else repr(mark)} are quoted",
            )
        else:
            yield where, dict(zip(header, cells, strict=True))


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "" in header or len(set(header)) < len(header):
        raise DataError(f"{where}: the header must name each column once, found {', '.join(map(repr, header))}.")
    return header


def _decode_error(cells: list[str]) -> UnicodeDecodeError:
    content = "".join(cells).encode("utf-8", "surrogateescape")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    raise AssertionError("the cells were found to hold bytes that are not UTF-8")
