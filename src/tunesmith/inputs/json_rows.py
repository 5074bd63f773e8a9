"""JSON lines and JSON documents, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.inputs.files import lines, not_utf8, opened
from tunesmith.inputs.rows import BadRow, Entry, first_line, kind


def json_rows(path: Path, name: str) -> Callable[[Sequence[str]], Iterator[Entry]]:
    """A reader of a file that is one document, or one object a line.

    Raises:
        DataError: from the reader, on a document that is not JSON or holds no list.
    """
    # The content decides between one document and one object a line: both endings are used for both.
    filled = (line.strip() for _, line in lines(path, name) if line.strip())
    first, more = next(filled, b""), next(filled, None) is not None
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        by_line = not first.startswith(b"[") and not path.name.lower().removesuffix(".gz").endswith(".json")
    else:
        whole = isinstance(found, list) or (isinstance(found, dict) and isinstance(found.get("data"), list))
        by_line = more or not whole
    return (lambda _: _by_line(path, name)) if by_line else (lambda _: _document(path, name))


def _by_line(path: Path, name: str) -> Iterator[Entry]:
    for number, line in lines(path, name):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8").rstrip())
        except UnicodeDecodeError as error:
            yield BadRow(where, "encoding", not_utf8(error))
        except json.JSONDecodeError as error:
            hint = "; JSON wants double quotes" if line.lstrip().startswith(b"{'") else ""
            hint = "; each object stands on one line" if line.strip() == b"{" else hint
            yield BadRow(where, "unreadable", f"not JSON: {error.msg} at column {error.colno}{hint}")
        except (ValueError, RecursionError) as error:
            yield BadRow(where, "unreadable", f"not JSON: {first_line(error)}")
        else:
            yield (where, row) if isinstance(row, dict) else _no_object(where, row)


def _no_object(where: str, row: Any) -> BadRow:
    return BadRow(where, "unreadable", f"expected an object of fields, found {kind(row)}")


def _document(path: Path, name: str) -> Iterator[Entry]:
    with opened(path, name) as file:
        content = file.read()
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: {not_utf8(error)}.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {first_line(error)}.") from None
    rows = found.get("data") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        keys = f" with the fields {', '.join(list(found)[:10])}" if isinstance(found, dict) else ""
        raise DataError(
            f'{name}: expected a list of objects, or {{"data": [...]}}; found {kind(found)}{keys}. One object a line '
            "is read as well."
        )
    for number, row in enumerate(rows, 1):
        where = f"{name}, item {number}"
        yield (where, row) if isinstance(row, dict) else _no_object(where, row)
