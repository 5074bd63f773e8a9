"""Every accepted source gives its rows with their places; every other is named with what is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from tests.inputs.conftest import pairs
from tunesmith.errors import DataError
from tunesmith.inputs import read_rows

Write = Callable[..., str]
ROWS = pairs(3)


def rows_of(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows(source, **options)]


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, **options)
    return str(caught.value)


def as_csv(rows: list[dict[str, str]], mark: str = ",") -> str:
    return "\n".join(mark.join(line) for line in [list(rows[0]), *(list(row.values()) for row in rows)]) + "\n"


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.json", "R.JSONL"])
def test_json_lines(write: Write, name: str) -> None:
    raw = read_rows(write(name, ROWS))
    assert [where for where, _ in raw] == [f"{name}:{line}" for line in (1, 2, 3)]
    assert [row for _, row in raw] == ROWS
    assert (raw.count, raw.columns) == (3, {"prompt": "text", "completion": "text"})


def test_blank_lines_and_a_byte_order_mark_are_no_rows(write: Write) -> None:
    content = "﻿" + "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n  \r\n"
    assert [where for where, _ in read_rows(write("r.jsonl", content))] == ["r.jsonl:1", "r.jsonl:3", "r.jsonl:5"]
    assert rows_of("r.jsonl") == ROWS


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
@pytest.mark.parametrize(("content", "indent"), [(ROWS, None), (ROWS, 2), ({"data": ROWS}, None)])
def test_json_documents(write: Write, name: str, content: Any, indent: int | None) -> None:
    assert rows_of(write(name, json.dumps(content, indent=indent))) == ROWS
    assert rows_of(write("r.json", json.dumps({"data": ROWS}, indent=2))) == ROWS


def test_places_in_a_document_are_items(write: Write) -> None:
    assert [where for where, _ in read_rows(write("r.json", json.dumps(ROWS)))][1] == "r.json, item 2"


@pytest.mark.parametrize(("name", "mark"), [("r.csv", ","), ("r.tsv", "\t"), ("r.csv", ";"), ("r.csv", "\t")])
def test_tables(write: Write, name: str, mark: str) -> None:
    raw = read_rows(write(name, as_csv(ROWS, mark)))
    assert [row for _, row in raw] == ROWS
    assert [where for where, _ in raw] == [f"{name}:{line}" for line in (2, 3, 4)]


def test_quoted_line_breaks_keep_the_line_numbers_right(write: Write) -> None:
    raw = read_rows(write("r.csv", 'prompt,completion\n"a\nb","c ""d"", e"\nf,g\n'))
    assert list(raw) == [
        ("r.csv:2", {"prompt": "a\nb", "completion": 'c "d", e'}),
        ("r.csv:4", {"prompt": "f", "completion": "g"}),
    ]


def test_long_cells(write: Write) -> None:
    assert rows_of(write("r.csv", f"text\n{'x' * 200_000}\n"))[0]["text"] == "x" * 200_000


@pytest.mark.parametrize(("name", "content"), [("r.jsonl.gz", None), ("r.csv.gz", as_csv(ROWS))])
def test_gzip(write: Write, name: str, content: str | None) -> None:
    content = content or "".join(json.dumps(row) + "\n" for row in ROWS)
    assert rows_of(write(name, gzip.compress(content.encode()))) == ROWS
    assert "is not a complete gzip file" in error_of(write("cut.jsonl.gz", gzip.compress(content.encode())[:-12]))


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "saved"])
def test_arrow(write: Write, tmp_path: Path, name: str) -> None:
    write("other.txt", "")
    dataset = Dataset.from_list(ROWS)
    if name == "r.parquet":
        dataset.to_parquet(name)
    elif name == "saved":
        dataset.with_format("torch").save_to_disk(name)
    else:
        dataset.save_to_disk("tmp")
        next(Path("tmp").glob("*.arrow")).rename(name)
    raw = read_rows(name)
    assert list(raw)[1] == (f"{name}, row 2", ROWS[1])
    assert raw.columns == {"prompt": "text", "completion": "text"}


def test_saved_splits(write: Write) -> None:
    write("other.txt", "")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(pairs(2, 10))).save_to_disk("saved")
    train = read_rows("saved")
    assert [row for _, row in train] == ROWS
    assert train.held_out is not None
    assert [row for _, row in train.held_out] == pairs(2, 10)
    assert rows_of("saved", what="data.eval") == pairs(2, 10)


def test_splits_without_one_to_train_on(write: Write) -> None:
    write("other.txt", "")
    DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS)).save_to_disk("saved")
    assert error_of("saved") == "data.train: saved has the splits a, b; one called train is expected."


def test_a_folder_of_files(write: Write) -> None:
    write("data/train-00.jsonl", ROWS[:2])
    write("data/train-01.jsonl", ROWS[2:])
    write("data/test.jsonl", pairs(1, 5))
    write("data/other.jsonl", pairs(1, 6))
    raw = read_rows("data")
    assert [where for where, _ in raw] == [
        "data/train-00.jsonl:1",
        "data/train-00.jsonl:2",
        "data/train-01.jsonl:1",
    ]
    assert (raw.count, raw.notes) == (3, ["files in data that were not read: other.jsonl"])
    assert raw.held_out is not None
    assert [row for _, row in raw.held_out] == pairs(1, 5)


def test_a_folder_of_files_without_splits(write: Write) -> None:
    write("data/a.jsonl", ROWS[:2])
    write("data/b.csv", as_csv(ROWS[2:]))
    raw = read_rows("data")
    assert [row for _, row in raw] == ROWS
    assert raw.held_out is None


def test_a_data_set_in_memory() -> None:
    assert rows_of(Dataset.from_list(ROWS)) == ROWS


def test_a_file_that_is_not_there(write: Write) -> None:
    write("rows.jsonl", ROWS)
    message = "data.train: there is no file or folder 'row.jsonl'. Did you mean 'rows.jsonl'?"
    assert error_of("row.jsonl") == message
    assert error_of("no/such/folder/rows").startswith("data.train: there is no file or folder 'no/such/folder/rows'.")


def test_neither_a_file_nor_a_hub_id(write: Write) -> None:
    write("rows.jsonl", ROWS)
    message = error_of("someone/their-rows", what="data.eval")
    assert message.startswith("data.eval: there is no file or folder 'someone/their-rows'. As a hub data set it cannot")
    assert "save_to_disk" in message


def test_endings_that_are_not_known(write: Write) -> None:
    message = error_of(write("rows.txt", "a\n"))
    assert "data.train: rows.txt has an ending that is not known" in message
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_empty_files(write: Write, name: str, content: str) -> None:
    assert error_of(write(name, content)) == f"{name} is empty: it has no rows."


@pytest.mark.parametrize(("name", "content"), [("r.json", "[]"), ("r.csv", "prompt,completion\n")])
def test_files_without_rows(write: Write, name: str, content: str) -> None:
    assert error_of(write(name, content)) == f"{name} is empty: it has no rows."


def test_folders_without_anything_to_read(write: Write) -> None:
    write("data/notes.txt", "")
    message = error_of("data")
    assert "the folder data holds nothing that can be read" in message
    assert "It has: notes.txt." in message


def test_a_saved_folder_that_is_not_complete(write: Write) -> None:
    write("saved/state.json", "{}")
    assert "saved was saved by `datasets` but is not complete" in error_of("saved")


UNREADABLE = [
    ('{"prompt": "a" "b"}', "unreadable", "not JSON: Expecting ',' delimiter at column 16"),
    ("{'prompt': 'a'}", "unreadable", "JSON wants double quotes"),
    ("{", "unreadable", "each object stands on one line"),
    ('["a"]', "unreadable", "expected an object of fields, found a list"),
    ("3", "unreadable", "expected an object of fields, found a number"),
    ("[" * 100_000, "unreadable", "not JSON"),
]


@pytest.mark.parametrize(("line", "kind", "reason"), UNREADABLE)
def test_unreadable_lines(write: Write, line: str, kind: str, reason: str) -> None:
    write("r.jsonl", [ROWS[0], line, *ROWS[1:]])
    message = error_of("r.jsonl")
    assert message.startswith("r.jsonl:2: ")
    assert reason in message
    assert "`data.skip_bad_rows`" in message
    raw = read_rows("r.jsonl", skip_bad_rows=True)
    assert [row for _, row in raw] == ROWS
    assert [(bad.where, bad.kind) for bad in raw.bad] == [("r.jsonl:2", kind)]
    assert reason in raw.bad[0].reason


def test_lines_that_are_not_utf8(write: Write) -> None:
    lines = [json.dumps(ROWS[0]).encode(), '{"prompt": "café"}'.encode("latin-1"), json.dumps(ROWS[1]).encode()]
    write("r.jsonl", b"\n".join(lines))
    assert "r.jsonl:2: not UTF-8 (byte 0xe9 at position 16)" in error_of("r.jsonl")
    assert rows_of("r.jsonl", skip_bad_rows=True) == ROWS[:2]


def test_cells_and_documents_that_are_not_utf8(write: Write) -> None:
    write("r.csv", b"text\nfine\ncaf\xe9\nalso fine\n")
    assert "r.csv:3: not UTF-8 (byte 0xe9 at position 4)" in error_of("r.csv")
    assert rows_of("r.csv", skip_bad_rows=True) == [{"text": "fine"}, {"text": "also fine"}]
    assert "r.json:2: not UTF-8" in error_of(write("r.json", b'[\n{"text": "caf\xe9"}]'))
    assert "r.csv is UTF-16 text" in error_of(write("r.csv", "text\na\n".encode("utf-16")))


def test_rows_of_tables_that_do_not_fit_the_header(write: Write) -> None:
    write("r.csv", 'a,b\n1,2\n1,2,3\n1\n"x"y,2\n5,6\n')
    message = error_of("r.csv")
    assert message.startswith("r.csv:3: expected 2 cells as in the header (a, b), found 3; texts that hold ',' are")
    assert "2 more: r.csv:4: expected 2 cells" in message
    raw = read_rows("r.csv", skip_bad_rows=True)
    assert [row for _, row in raw] == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    assert [bad.where for bad in raw.bad] == ["r.csv:3", "r.csv:4", "r.csv:5"]


def test_a_quote_that_is_never_closed(write: Write) -> None:
    assert "r.csv:3: not CSV: unexpected end of data" in error_of(write("r.csv", 'a,b\n1,2\n"1,2\n3,4\n'))


@pytest.mark.parametrize("header", ["a,a", "a,", '"a"b,c'])
def test_headers_that_are_none(write: Write, header: str) -> None:
    assert error_of(write("r.csv", f"{header}\n1,2\n")).startswith("r.csv:1: the header ")


@pytest.mark.parametrize(
    ("content", "found"),
    [('{"rows": [1]}\n{', "r.json:2: not JSON"), ('{\n"rows": [1]}', "found an object with the fields rows")],
)
def test_documents_without_a_list(write: Write, content: str, found: str) -> None:
    assert found in error_of(write("r.json", content))


def test_files_that_are_not_what_they_say(write: Write) -> None:
    assert "r.parquet cannot be read as Parquet" in error_of(write("r.parquet", "no"))
    assert "r.arrow cannot be read as Arrow" in error_of(write("r.arrow", "no"))


def test_all_problems_are_counted_and_the_first_are_named(write: Write) -> None:
    write("r.jsonl", [*ROWS, *["no"] * 30])
    message = error_of("r.jsonl")
    assert message.count("r.jsonl:") == 5
    assert "29 more: " in message
    raw = read_rows("r.jsonl", skip_bad_rows=True)
    summary = raw.problems.summary()
    assert (summary["count"], summary["kinds"], len(summary["first"]), len(raw.bad)) == (30, {"unreadable": 30}, 20, 30)
    assert "none of its 2 rows can be used. The first: r2.jsonl:1: not JSON" in error_of(
        write("r2.jsonl", ["no", "no"]), skip_bad_rows=True
    )
