"""One row, looked at field by field: what the task needs, in our names, or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.inputs.columns import Meaning
from tunesmith.inputs.rows import RawRows, Row, RowError, kind

ROLES = ("system", "developer", "user", "assistant", "tool")


class Checker:
    """Rows of one source -> rows of our columns.

    Conversations, given as `messages` or as lists in prompt and completion, all become `messages` with `context`, the
    number of leading messages that carry no loss.
    """

    def __init__(self, raw: RawRows, meaning: Meaning) -> None:
        self.theirs = meaning.theirs
        self.typed = raw.typed
        self.classes = raw.classes.get(self.theirs.get("label", ""))
        self.chat = meaning.chat
        ways: dict[tuple[str, ...], Callable[[Row], dict[str, Any]]] = {
            ("messages",): self._messages,
            ("prompt", "completion"): self._turns if self.chat else self._prompt_completion,
            ("text",): lambda row: {"text": self._text(row, "text")},
            ("text", "label"): lambda row: {"text": self._text(row, "text"), "label": self._label(row)},
            ("image", "label"): lambda row: {"image": self._value(row, "image"), "label": self._label(row)},
        }
        self._way = ways[meaning.shape]

    def __call__(self, row: Row) -> dict[str, Any]:
        """The row in our columns.

        Raises:
            RowError: the field, what was expected and what was found.
        """
        found = self._way(row)
        if self.chat:
            found["tools"] = self._tools(row)
        if "family" in self.theirs:
            group = row.get(self.theirs["family"])
            found["group"] = None if group is None else str(group)
        return found

    def _value(self, row: Row, field: str) -> Any:
        name = self.theirs[field]
        if name not in row:
            raise RowError("missing", f"field {name!r} is missing; the row has {', '.join(row) or 'no fields'}")
        return row[name]

    def _text(self, row: Row, field: str, empty: bool = False) -> str:
        name = self.theirs[field]
        return _text(self._value(row, field), f"field {name!r}", empty)

    def _prompt_completion(self, row: Row) -> dict[str, Any]:
        return {"prompt": self._text(row, "prompt", empty=True), "completion": self._text(row, "completion")}

    def _label(self, row: Row) -> str:
        value, name = self._value(row, "label"), self.theirs["label"]
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return self._class_name(int(value), name)
        if isinstance(value, str):
            return _text(value, f"field {name!r}").strip()
        found = str(value) if isinstance(value, float) else kind(value)
        raise RowError("type", f"field {name!r}: expected a class name or a whole number, found {found}")

    def _class_name(self, number: int, name: str) -> str:
        if self.classes is None:
            return str(number)
        if not 0 <= number < len(self.classes):
            found = f"{number} (a row without a label)" if number == -1 else str(number)
            raise RowError(
                "label", f"field {name!r}: expected a class from 0 to {len(self.classes) - 1}, found {found}"
            )
        return self.classes[number]

    def _messages(self, row: Row) -> dict[str, Any]:
        name = self.theirs["messages"]
        messages = self._list(self._value(row, "messages"), name)
        _ends_with_assistant(messages, name)
        return {"messages": messages, "context": 0}

    def _turns(self, row: Row) -> dict[str, Any]:
        prompt, completion = (
            self._list(self._value(row, field), self.theirs[field]) for field in ("prompt", "completion")
        )
        _ends_with_assistant(completion, self.theirs["completion"])
        return {"messages": prompt + completion, "context": len(prompt)}

    def _list(self, value: Any, name: str) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise RowError("type", f"field {name!r}: expected a list of messages, found {kind(value)}")
        if not value:
            raise RowError("empty", f"field {name!r}: expected messages, found an empty list")
        return [_message(_without_none(m) if self.typed else m, f"{name}[{at}]") for at, m in enumerate(value)]

    def _tools(self, row: Row) -> list[Any] | None:
        value = row.get(self.theirs.get("tools", ""))
        name = self.theirs.get("tools")
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except ValueError:
                raise RowError(
                    "type", f"field {name!r}: expected a list of tools, found text that is not JSON"
                ) from None
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise RowError("type", f"field {name!r}: expected a list of tools (objects), found {kind(value)}")
        return [_without_none(tool) if self.typed else tool for tool in value]


def _text(value: Any, place: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError("type", f"{place}: expected text, found {kind(value)}")
    if not empty and not value.strip():
        raise RowError("empty", f"{place}: expected text, found {'only white space' if value else 'an empty text'}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise RowError("encoding", f"{place}: half a character ({half}) at position {error.start + 1}") from None
    return value


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError("type", f"{place}: expected an object with role and content, found {kind(value)}")
    if "role" not in value:
        found = ", ".join(value) or "nothing"
        hint = (
            "; from/value become role/content, human/gpt become user/assistant"
            if {"from", "value"} <= set(value)
            else ""
        )
        raise RowError("missing", f"{place}: expected role and content, found {found}{hint}")
    role = value["role"]
    if role not in ROLES:
        raise RowError("role", f"{place}.role: unknown role {role!r}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    message = dict(value)
    content = message.get("content")
    if message.get("tool_calls") and role == "assistant":
        # None would be printed as "None" by many templates.
        message["content"] = "" if content is None else _text(_joined(content, place), f"{place}.content", empty=True)
        return message
    if "content" not in message:
        raise RowError("missing", f"{place}: has no content")
    message["content"] = _text(_joined(content, place), f"{place}.content", empty=role != "assistant")
    return message


def _joined(content: Any, place: str) -> Any:
    """Blocks of text as one text; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    for at, block in enumerate(content):
        if not isinstance(block, Mapping) or block.get("type") != "text":
            found = block.get("type") if isinstance(block, Mapping) else kind(block)
            raise RowError("type", f"{place}.content[{at}]: expected a block of type 'text', found {found!r}")
    return "".join(_text(block.get("text"), f"{place}.content[{at}].text", True) for at, block in enumerate(content))


def _ends_with_assistant(messages: list[dict[str, Any]], name: str) -> None:
    role = messages[-1]["role"]
    if role != "assistant":
        raise RowError("no-answer", f"field {name!r}: expected the assistant's message at the end, found the {role}'s")


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
