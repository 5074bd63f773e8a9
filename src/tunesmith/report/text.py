"""Text that a model or a data set wrote: made visible, clipped, and compared word by word."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

# A zero-width joiner and non-joiner spell words and emoji; every other invisible format character can only mislead.
_JOINERS = "\u200c\u200d"
_WORD = re.compile(r"\w+|[^\w\s]|\s+")
# Comparing words takes time by the square of their number.
_MOST_WORDS = 2000
_ALIKE = 0.3


def visible(text: str) -> str:
    """Control, bidirectional and invisible characters as `<U+202E>`; new lines and tabs stay."""
    return "".join(_escape(char) if _hidden(char) else char for char in text)


def _hidden(char: str) -> bool:
    if char in "\n\t" or char in _JOINERS:
        return False
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(char: str) -> str:
    return f"<U+{ord(char):04X}>"


def clip(text: str, characters: int, lines: int) -> str:
    """The beginning of `text`, at most so long; the same object where nothing had to go."""
    short = text[:characters]
    parts = short.split("\n")
    if len(parts) > lines:
        short = "\n".join(parts[:lines])
    return text if len(short) == len(text) else short.rstrip()


@dataclass(frozen=True)
class Piece:
    """A run of an answer.

    Attributes:
        kind: `same` as expected; `extra`: not expected; `missing`: expected, and not in the answer.
    """

    kind: Literal["same", "extra", "missing"]
    text: str


def compare(expected: str, answer: str) -> list[Piece]:
    """`answer` against `expected`, word by word.

    White space counts with the word before it and is compared last: two texts of the same words differ nowhere. An
    answer that has little in common with what was expected is one `extra` piece, for marks on every word hide it.
    """
    if not expected or not answer or answer.strip() == expected.strip():
        return [Piece("same", answer)] if answer else []
    wanted, got = _words(expected), _words(answer)
    if max(len(wanted), len(got)) > _MOST_WORDS:
        return [Piece("same", answer)]
    matcher = SequenceMatcher(None, [w.strip() for w in wanted], [w.strip() for w in got], autojunk=False)
    if matcher.ratio() < _ALIKE:
        return [Piece("extra", answer)]
    pieces: list[Piece] = []
    for operation, i, to_i, j, to_j in matcher.get_opcodes():
        if operation == "equal":
            pieces.append(Piece("same", "".join(got[j:to_j])))
            continue
        if to_i > i:
            # The word before may have lost its space in the answer; the one in the expected text stands in for it.
            apart = " " if i and wanted[i - 1][-1:].isspace() and not got[j - 1][-1:].isspace() else ""
            pieces.append(Piece("missing", apart + "".join(wanted[i:to_i])))
        if to_j > j:
            pieces.append(Piece("extra", "".join(got[j:to_j])))
    return pieces


def _words(text: str) -> list[str]:
    """Words with the white space after them; white space at the beginning stands alone."""
    words: list[str] = []
    for match in _WORD.finditer(text):
        if match[0].isspace() and words:
            words[-1] += match[0]
        else:
            words.append(match[0])
    return words
