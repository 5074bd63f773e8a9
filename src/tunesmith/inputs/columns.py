"""Which columns mean what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, did_you_mean
from tunesmith.inputs.rows import RawRows

if TYPE_CHECKING:
    from tunesmith.recipe import Task

FIELDS = ("prompt", "completion", "messages", "tools", "text", "label", "image", "family")
"""Our names; `tools` goes with messages, `family` groups rows in an evaluation."""
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("text",)),
    "seq2seq": (("prompt", "completion"),),
    "text-classification": (("text", "label"),),
    "image-classification": (("image", "label"),),
}
"""Task -> the sets of columns that it takes."""
_LISTS = ("a list", "anything")
# Only ever suggested, never assumed.
_ALIKE = {
    "prompt": ("question", "instruction", "input", "query", "source", "context", "document", "article", "user"),
    "completion": ("answer", "response", "output", "target", "reply", "summary", "solution", "chosen", "assistant"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "sentence", "review", "body", "document", "comment", "title", "utterance"),
    "label": ("labels", "class", "category", "target", "intent", "sentiment", "y", "tag", "fine_label"),
    "image": ("img", "picture", "file", "path", "file_name", "filename", "image_path", "photo"),
}


@dataclass(frozen=True)
class Meaning:
    """How a source's columns are read.

    Attributes:
        shape: Our names of the columns that make an example.
        theirs: Our name -> the source's, `tools` and `family` included where they are there.
        ignored: Columns of the source that nothing is read from.
        chat: Whether the rows are conversations: `messages`, or prompt and completion as lists of messages.
    """

    shape: tuple[str, ...]
    theirs: dict[str, str]
    ignored: tuple[str, ...]
    chat: bool

    @property
    def words(self) -> str:
        return " + ".join(self.shape)


def meaning(raw: RawRows, task: Task, columns: Mapping[str, str]) -> Meaning:
    """Which of the source's columns are the example.

    Args:
        columns: Our names -> the source's, as in the recipe. Names that are not mapped stand for themselves.

    Raises:
        DataError: a mapping of names that do not exist, columns that fit no shape, or that fit two.
    """
    ours = named(raw, columns)
    fitting = [shape for shape in SHAPES[task] if all(field in ours for field in shape)]
    if any(set(columns) & set(shape) for shape in fitting):
        fitting = [shape for shape in fitting if set(columns) & set(shape)]
    if not fitting:
        raise DataError(_unfit(raw, task, columns))
    if len(fitting) > 1:
        ways = " or ".join(f"`columns: {_flow({f: ours[f] for f in shape})}`" for shape in fitting)
        raise DataError(
            f"{raw.name}: its columns can be read in {len(fitting)} ways, as {' and as '.join(map(plus, fitting))}. "
            f"Write which one is meant: {ways}."
        )
    shape = fitting[0]
    chat = "messages" in shape or ("prompt" in shape and raw.columns[ours["prompt"]] in _LISTS)
    wanted = (*shape, *(("tools",) if chat else ()), "family")
    theirs = {field: ours[field] for field in wanted if field in ours}
    return Meaning(shape, theirs, tuple(c for c in raw.columns if c not in theirs.values()), chat)


def named(raw: RawRows, columns: Mapping[str, str]) -> dict[str, str]:
    """Our names that the source has columns for -> its names.

    Raises:
        DataError: the mapping names what does not exist.
    """
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            swapped = f" It is written ours: theirs, so perhaps `{theirs}: {ours}`." if theirs in FIELDS else ""
            raise DataError(
                f"data.columns: {ours!r} is none of our names.{swapped or did_you_mean(ours, FIELDS)} They are: "
                f"{', '.join(FIELDS)}."
            )
    if raw.what != "data.train" and columns and not set(columns.values()) & set(raw.columns):
        columns = {}  # evaluation rows may already have our names when the training rows do not
    for ours, theirs in columns.items():
        if theirs not in raw.columns:
            raise DataError(
                f"data.columns: {ours} is mapped to {theirs!r}, but {raw.name} has no such column."
                f"{did_you_mean(theirs, raw.columns)} It has: {', '.join(raw.columns)}."
            )
    taken = set(columns.values())
    own = {field: field for field in FIELDS if field in raw.columns and field not in taken}
    return {**own, **columns}


def _unfit(raw: RawRows, task: Task, columns: Mapping[str, str]) -> str:
    free = [column for column in raw.columns if column not in columns.values()]
    guesses = [(_guess(shape, free, columns), shape) for shape in SHAPES[task]]
    guess, shape = max(guesses, key=lambda pair: len(pair[0]) / len(pair[1]))
    if not guess:
        shape = SHAPES[task][-1]
    line = _flow({field: guess.get(field, "YOUR_COLUMN") for field in shape})
    accepted = ", or ".join(map(plus, SHAPES[task]))
    return (
        f"{raw.name}: its columns are {', '.join(raw.columns)}; {task} takes {accepted}. If a column is one of these "
        f"under another name, say so in the recipe, for example `columns: {line}`."
    )


def _guess(shape: tuple[str, ...], free: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    guess: dict[str, str] = {}
    for field in shape:
        alike = [c for name in (field, *_ALIKE[field]) for c in free if c.lower() == name and c not in guess.values()]
        if field in columns or alike:
            guess[field] = columns.get(field) or alike[0]
    return guess


def plus(shape: tuple[str, ...]) -> str:
    """A shape in words."""
    return " + ".join(f"`{field}`" for field in shape)


def _flow(mapping: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items()) + "}"
