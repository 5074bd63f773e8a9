"""What a row of each task is as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from datasets import List, Value

from tunesmith.errors import DataError
from tunesmith.inputs.chat import ChatTemplate, with_system
from tunesmith.inputs.example import Example
from tunesmith.inputs.rows import RowError
from tunesmith.inputs.text import PlainText, end_token, surroundings

_IDS = List(Value("int32"))
Batch = Mapping[str, Sequence[Any]]


class Encoder(Protocol):
    """Rows of one task to examples."""

    @property
    def features(self) -> Mapping[str, Any]:
        """Column -> its type."""
        ...

    def batch(self, rows: Batch) -> list[Example | RowError]:
        """Examples of rows given by column."""
        ...

    def cut(self, example: Example, limit: int) -> Example:
        """The example within `limit` tokens."""
        ...


class Causal:
    """Causal language models: text, prompt and completion, or conversations.

    Raises:
        DataError: `chat` and `system` do not fit the rows or the tokenizer.
    """

    features = {"input_ids": _IDS, "labels": _IDS, "prompt_length": Value("int32")}

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        columns: Sequence[str],
        chat: Literal["auto", "always", "never"] = "auto",
        system: str | None = None,
        loss_on: Literal["completion", "all"] = "completion",
    ) -> None:
        self.system, self.everything = system, loss_on == "all"
        conversations = "messages" in columns
        if conversations and chat == "never":
            raise DataError(
                "data.chat is never, but the rows are conversations: only a chat template makes text of them."
            )
        if "text" in columns and chat == "always":
            raise DataError("data.chat is always, but the rows are plain text: who says what is not known.")
        templated = conversations or chat == "always"
        if system is not None and not templated:
            raise DataError(
                "data.system needs a chat template, and these rows do not go through one. Set `data.chat: always`, or "
                "put the words into the prompts."
            )
        who = "Rows with messages" if conversations else "Rows under `data.chat: always`"
        self.chat = ChatTemplate(tokenizer, who) if templated else None
        self.plain = None if templated else PlainText(tokenizer, config)

    def batch(self, rows: Batch) -> list[Example | RowError]:
        if self.plain is None:
            return [self._conversation(*row) for row in _conversations(rows)]
        found = (
            self.plain.texts(rows["text"]) if "text" in rows else self.plain.pairs(rows["prompt"], rows["completion"])
        )
        return [self._loss(example) for example in found]

    def cut(self, example: Example, limit: int) -> Example:
        assert isinstance(example.labels, list)
        start = min(example.prompt_length or 0, limit)
        return Example(example.ids[:limit], example.labels[:limit], start, example.parted)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], tools: Any, context: int) -> Example | RowError:
        assert self.chat is not None
        whole = with_system(messages, self.system)
        try:
            context += len(whole) - len(messages) if context else 0
            return self._loss(self.chat.encode(whole, tools, context, self.everything))
        except RowError as bad:
            return bad

    def _loss(self, example: Example) -> Example:
        return replace(example, labels=example.ids) if self.everything else example


def _conversations(rows: Batch) -> list[tuple[Sequence[Mapping[str, Any]], Any, int]]:
    if "messages" in rows:
        blank = [None] * len(rows["messages"])
        return list(zip(rows["messages"], rows.get("tools", blank), rows.get("context", [0] * len(blank)), strict=True))
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    return [([{"role": "user", "content": p}, {"role": "assistant", "content": c}], None, 0) for p, c in pairs]


class _Surrounded:
    """A tokenizer's own special tokens around each text, kept when it is cut."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.after = surroundings(tokenizer)[1]

    def _ids(self, **texts: Any) -> list[list[int]]:
        return self.tokenizer(**texts, verbose=False)["input_ids"]

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        return ids if len(ids) <= limit else [*ids[: max(limit - len(self.after), 0)], *self.after][:limit]


class Seq2Seq(_Surrounded):
    """Encoder-decoder models: the prompt goes in, the completion is the target; both end with EOS."""

    features = {"input_ids": _IDS, "labels": _IDS}

    def __init__(self, tokenizer: Any, config: Any) -> None:
        super().__init__(tokenizer)
        self.missing = [] if self.after else [end_token(tokenizer, config)]
        self.after = self.after or self.missing

    def batch(self, rows: Batch) -> list[Example | RowError]:
        inputs, targets = self._ids(text=list(rows["prompt"])), self._ids(text_target=list(rows["completion"]))
        return [Example([*i, *self.missing], [*t, *self.missing]) for i, t in zip(inputs, targets, strict=True)]

    def cut(self, example: Example, limit: int) -> Example:
        assert isinstance(example.labels, list)
        return Example(self._cut(example.ids, limit), self._cut(example.labels, limit))


class TextClassifier(_Surrounded):
    """A text and its class."""

    features = {"input_ids": _IDS, "labels": Value("int64")}

    def batch(self, rows: Batch) -> list[Example | RowError]:
        return [
            Example(ids, label) for ids, label in zip(self._ids(text=list(rows["text"])), rows["label"], strict=True)
        ]

    def cut(self, example: Example, limit: int) -> Example:
        return Example(self._cut(example.ids, limit), example.labels)
