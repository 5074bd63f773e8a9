"""Real text: the standard library, split by module."""

from __future__ import annotations

import ast
from itertools import islice
from typing import get_args

import pytest

from tunesmith.errors import DataError
from tunesmith.world import realtext

SPLITS = get_args(realtext.TextSplit)


def test_splits_share_no_module_and_all_are_used() -> None:
    named = {split: {module for module, _ in realtext.modules(split)} for split in SPLITS}
    assert not named["pretrain"] & named["train"]
    assert not named["pretrain"] & named["heldout"]
    assert not named["train"] & named["heldout"]
    assert len(named["pretrain"]) > 200
    assert min(len(names) for names in named.values()) > 30
    assert not any("test" in module.split(".") for names in named.values() for module in names)


@pytest.mark.parametrize(("module", "split"), [("glob", "heldout"), ("csv", "pretrain"), ("argparse", "train")])
def test_split_of_a_module_is_fixed(module: str, split: str) -> None:
    assert realtext.module_split(module) == split


def test_functions_parse_and_lost_their_docstring() -> None:
    found = list(realtext.functions("train", seed=1, n=60, max_chars=300))
    assert len(found) == 60
    allowed = {module for module, _ in realtext.modules("train")}
    for module, source, docstring in found:
        assert module in allowed
        assert len(source) <= 300
        (node,) = ast.parse(source).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert ast.get_docstring(node) is None or ast.get_docstring(node) != docstring
        assert docstring.strip()


def test_functions_follow_the_seed() -> None:
    one = list(realtext.functions("heldout", seed=1, n=20))
    assert one == list(realtext.functions("heldout", seed=1, n=20))
    assert one != list(realtext.functions("heldout", seed=2, n=20))


def test_docstring_rows() -> None:
    rows = realtext.docstring_dataset(30, split="heldout", seed=3)
    assert rows.column_names == ["prompt", "completion"]
    for row, (_, source, docstring) in zip(rows, realtext.functions("heldout", seed=3, n=30), strict=True):
        assert row["prompt"] == f"{source}\n{realtext.INSTRUCTION}\n"
        assert docstring.strip().startswith(row["completion"])
        assert row["completion"]
        assert "\n" not in row["completion"]


def test_text_stream_loses_nothing() -> None:
    pieces = list(islice(realtext.text_stream("heldout", seed=0, max_chars=500), 40))
    lengths = [len(piece) for piece in pieces]
    assert all(len(piece) <= 500 or piece.count("\n") == 1 for piece in pieces)
    assert max(lengths) > 300
    whole = "".join(realtext.text_stream("heldout", seed=0))
    sources = [path.read_text(encoding="utf-8") for _, path in realtext.modules("heldout")]
    assert sum(len(text) for text in sources if text.strip()) == len(whole)


def test_mistakes() -> None:
    with pytest.raises(DataError, match="the split must be one of"):
        list(realtext.text_stream("test"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="99999 functions of the 'train' split"):
        list(realtext.functions("train", n=99999))
