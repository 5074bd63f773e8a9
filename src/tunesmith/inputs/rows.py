"""Rows as the user wrote them, with the place where each one stands, and what is wrong with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.errors import DataError

Kind = Literal[
    "unreadable", "encoding", "missing", "type", "empty", "role", "no-answer", "label", "image", "template", "no-label"
]
SHOWN = 20
"""Bad rows that a report shows; the object keeps all."""
_NAMED = 5
_SKIP = "Correct it, or set `data.skip_bad_rows` to leave such rows out."

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: `where` it stands (`rows.jsonl:17`), the `kind` of fault, the `reason` in words."""

    where: str
    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class RowError(Exception):
    """Raised while a row is looked at; becomes a `BadRow` once its place is known."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind: Kind = kind
        self.reason = reason

    def at(self, where: str) -> BadRow:
        return BadRow(where, self.kind, self.reason)


Entry = tuple[str, Row] | BadRow
"""What reading gives: the place of a row and the row, or a row that cannot be read."""


@dataclass
class Problems:
    """The bad rows of one source, in reading order."""

    skip: bool
    rows: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.rows.append(row)

    def settle(self, name: str, usable: int) -> None:
        """Stop if there are bad rows that may not be skipped, or nothing is left.

        Raises:
            DataError: names the first bad rows.
        """
        if self.rows and not self.skip:
            first, *others = self.rows
            more = ""
            if others:
                listed = "; ".join(str(row) for row in others[: _NAMED - 1])
                more = f" {len(others)} more: {listed}{'; ...' if len(others) >= _NAMED else ''}."
            raise DataError(f"{first}. {_SKIP}{more}")
        if not usable and self.rows:
            raise DataError(f"{name}: none of its {len(self.rows)} rows can be used. The first: {self.rows[0]}.")
        if not usable:
            raise DataError(f"{name} is empty: it has no rows.")

    def summary(self) -> dict[str, Any]:
        """How many, of which kinds, and the first `SHOWN` of them, as plain data."""
        return {
            "count": len(self.rows),
            "kinds": dict(Counter(row.kind for row in self.rows)),
            "first": [{"where": row.where, "reason": row.reason} for row in self.rows[:SHOWN]],
        }


@dataclass
class RawRows:
    """A source that has been found and can be read; its rows are read again each time they are iterated.

    Attributes:
        name: What messages call it: the path or id as it was given.
        what: The field of the recipe that names it, `data.train`.
        columns: Name -> kind of value (`text`, `a list`, ...), of the first row that has one.
        count: Readable rows.
        problems: Rows that could not be read.
        read: `(columns) -> entries`, only those columns where the format allows to leave the others.
        classes: Column -> the names behind its numbers, where the source declares them.
        typed: Whether rows come from Arrow, which writes None for keys that a row does not have.
        folder: What relative paths in the rows are relative to; None: the working folder.
        held_out: A validation or test split that the same source has.
        notes: What else the user should know about the source.
    """

    name: str
    what: str
    columns: dict[str, str]
    count: int
    problems: Problems
    read: Callable[[Sequence[str]], Iterator[Entry]]
    classes: dict[str, list[str]] = field(default_factory=dict)
    typed: bool = False
    folder: str | None = None
    held_out: RawRows | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """The readable rows with their places."""
        for entry in self.read(list(self.columns)):
            if not isinstance(entry, BadRow):
                yield entry

    @property
    def bad(self) -> list[BadRow]:
        return self.problems.rows


def kind(value: Any) -> str:
    """What to call a value in a message: `text`, `a list` ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for types, word in ((str, "text"), ((int, float), "a number"), (list, "a list"), (Mapping, "an object")):
        if isinstance(value, types):
            return word
    return f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def survey(name: str, what: str, skip: bool, read: Callable[[Sequence[str]], Iterator[Entry]], **more: Any) -> RawRows:
    """Read once through a source without a schema, for its columns and unreadable rows.

    Raises:
        DataError: an unreadable row that may not be skipped, or no rows.
    """
    columns: dict[str, str] = {}
    problems = Problems(skip)
    count = 0
    for entry in read(()):
        if isinstance(entry, BadRow):
            problems.add(entry)
            continue
        count += 1
        for key, value in entry[1].items():
            if columns.get(key, "null") == "null":
                columns[key] = kind(value)
    problems.settle(name, count)
    return RawRows(name, what, columns, count, problems, read, **more)
