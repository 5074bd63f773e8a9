"""Text made visible, clipped and compared."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.report.text import Piece, clip, compare, visible

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
sentences = st.lists(st.sampled_from(["a", "b", "cat", "sat", "on", ".", ",", "\n", "  "]), max_size=20).map(" ".join)


def test_visible() -> None:
    assert visible("a\u202eb\x1b[0m\x00\u200b\ufeff") == "a<U+202E>b<U+001B>[0m<U+0000><U+200B><U+FEFF>"
    assert visible("tabs\tand\nlines, مرحبا, 日本語, क्\u200dष") == "tabs\tand\nlines, مرحبا, 日本語, क्\u200dष"


@given(st.text(max_size=60))
def test_nothing_invisible_is_left(text: str) -> None:
    shown = visible(text)
    left = {char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left <= set("\n\t\u200c\u200d")
    assert visible(shown) == shown


@given(texts | st.text("ab\n", max_size=60), st.integers(0, 40), st.integers(1, 4))
def test_clip(text: str, characters: int, lines: int) -> None:
    short = clip(text, characters, lines)
    assert text.startswith(short)
    assert len(short) <= characters
    assert short.count("\n") < lines
    if len(text) <= characters and text.count("\n") < lines:
        assert short == text


@given(sentences | texts, sentences | texts)
def test_an_answer_can_be_read_from_its_pieces(expected: str, answer: str) -> None:
    pieces = compare(expected, answer)
    assert "".join(p.text for p in pieces if p.kind != "missing") == answer


@given(sentences, sentences)
def test_what_is_expected_can_be_read_from_the_pieces(expected: str, answer: str) -> None:
    pieces = compare(expected, answer)
    if any(p.kind == "missing" for p in pieces):
        assert "".join("".join(p.text for p in pieces if p.kind != "extra").split()) == "".join(expected.split())


def test_compare() -> None:
    assert compare("born in Lindhaven.", "born in Lindhaven.\n") == [Piece("same", "born in Lindhaven.\n")]
    assert compare("the cat sat", "the dog sat") == [
        Piece("same", "the "),
        Piece("missing", "cat "),
        Piece("extra", "dog "),
        Piece("same", "sat"),
    ]
    assert compare("the Bakery in Ostwick.", "the Bakery.") == [
        Piece("same", "the Bakery"),
        Piece("missing", " in Ostwick"),
        Piece("same", "."),
    ]
    assert compare("Petra", "entirely other words") == [Piece("extra", "entirely other words")]
    assert compare("", "anything") == [Piece("same", "anything")]
    assert compare("anything", "") == []
    assert compare("two  words here", "two words\nhere") == [Piece("same", "two words\nhere")]


def test_a_very_long_answer_is_not_compared() -> None:
    assert compare("word " * 3000, "word " * 2999 + "other") == [Piece("same", "word " * 2999 + "other")]
