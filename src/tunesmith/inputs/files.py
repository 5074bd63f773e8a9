"""The bytes of text files, gzipped or not."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tunesmith.errors import DataError
from tunesmith.inputs.rows import first_line


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if its name ends with .gz.

    Raises:
        DataError: it cannot be read or unpacked.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a complete gzip file: {first_line(error)}") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or first_line(error)}") from None


def lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, a byte order mark left out."""
    with opened(path, name) as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not UTF-8."""
    found = error.object[error.start]
    return (
        f"not UTF-8 (byte 0x{found:02x} at position {error.start + 1}); convert the file, for instance with "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )
