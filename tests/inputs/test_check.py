"""Each kind of bad row is named by file, line, field, what was expected and what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.inputs.conftest import pairs
from tunesmith.errors import DataError
from tunesmith.inputs import read_rows
from tunesmith.inputs.columns import meaning
from tunesmith.inputs.store import store

Write = Callable[..., str]
USER, SAID = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
CHAT = {"messages": [USER, SAID]}


def checked(source: Any, task: Any, folder: Path, skip: bool = False, columns: dict[str, str] | None = None) -> Any:
    raw = read_rows(source, skip_bad_rows=skip)
    return store(raw, meaning(raw, task, columns or {}), folder)


def message(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}, SAID]}


BAD = [
    (pairs(1)[0], {"prompt": "a", "completion": ["b"]}, "type", "field 'completion': expected text, found a list"),
    (pairs(1)[0], {"prompt": 3, "completion": "b"}, "type", "field 'prompt': expected text, found a number"),
    (pairs(1)[0], {"prompt": "a", "completion": None}, "type", "field 'completion': expected text, found null"),
    (pairs(1)[0], {"prompt": "a"}, "missing", "field 'completion' is missing; the row has prompt"),
    (pairs(1)[0], {"prompt": "a", "completion": ""}, "empty", "field 'completion': expected text, found an empty text"),
    (pairs(1)[0], {"prompt": "a", "completion": "\n"}, "empty", "'completion': expected text, found only white space"),
    (pairs(1)[0], {"prompt": "\ud83d", "completion": "b"}, "encoding", "'prompt': half a character (\\ud83d) at posi"),
    ({"text": "a"}, {"text": " \t"}, "empty", "field 'text': expected text, found only white space"),
    ({"text": "a"}, {"text": {}}, "type", "field 'text': expected text, found an object"),
    ({"text": "a"}, {"text": True}, "type", "field 'text': expected text, found true or false"),
    (CHAT, {"messages": "hello"}, "type", "field 'messages': expected a list of messages, found text"),
    (CHAT, {"messages": []}, "empty", "field 'messages': expected messages, found an empty list"),
    (CHAT, {"messages": [USER]}, "no-answer", "expected the assistant's message at the end, found the user's"),
    (CHAT, {"messages": ["hi"]}, "type", "messages[0]: expected an object with role and content, found text"),
    (
        CHAT,
        {"messages": [{"role": "bot", "content": "a"}]},
        "role",
        "messages[0].role: unknown role 'bot'; expected sys",
    ),
    (CHAT, {"messages": [{"content": "a"}]}, "missing", "messages[0]: expected role and content, found content"),
    (CHAT, {"messages": [{"from": "gpt", "value": "a"}]}, "missing", "from/value become role/content"),
    (CHAT, {"messages": [USER, {"role": "assistant"}]}, "missing", "messages[1]: has no content"),
    (
        CHAT,
        {"messages": [USER, {**SAID, "content": " "}]},
        "empty",
        "messages[1].content: expected text, found only wh",
    ),
    (CHAT, message(7), "type", "messages[0].content: expected text, found a number"),
    (
        CHAT,
        message([{"type": "image"}]),
        "type",
        "messages[0].content[0]: expected a block of type 'text', found 'image'",
    ),
    (CHAT, {**CHAT, "tools": "no"}, "type", "field 'tools': expected a list of tools, found text that is not JSON"),
    (CHAT, {**CHAT, "tools": [1]}, "type", "field 'tools': expected a list of tools (objects), found a list"),
]


@pytest.mark.parametrize(("good", "bad", "kind", "reason"), BAD)
def test_bad_rows(write: Write, tmp_path: Path, good: Any, bad: Any, kind: str, reason: str) -> None:
    good = {**good, "tools": None} if "tools" in bad else good
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    with pytest.raises(DataError) as caught:
        checked("rows.jsonl", "causal-lm", tmp_path)
    assert str(caught.value).startswith("rows.jsonl:2: ")
    assert reason in str(caught.value)
    rows = checked("rows.jsonl", "causal-lm", tmp_path, skip=True)
    assert rows.dataset["where"][:] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert [(row.where, row.kind) for row in rows.problems.rows] == [("rows.jsonl:2", kind)]


def test_the_users_own_names_are_used(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"q": "a", "a": "b"}, {"q": "a", "a": 1}])
    with pytest.raises(DataError, match=r"^rows.jsonl:2: field 'a': expected text, found a number. Correct it, or set"):
        checked("rows.jsonl", "causal-lm", tmp_path, columns={"prompt": "q", "completion": "a"})


def test_every_bad_row_is_counted(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [*pairs(2), "no", *[{"prompt": "a", "completion": i} for i in range(7)]])
    rows = checked("rows.jsonl", "causal-lm", tmp_path, skip=True)
    assert rows.problems.summary()["kinds"] == {"unreadable": 1, "type": 7}
    write("rows.jsonl", [{"prompt": "a", "completion": i} for i in range(7)])
    with pytest.raises(DataError, match=r"rows.jsonl: none of its 7 rows can be used. The first: rows.jsonl:1: field"):
        checked("rows.jsonl", "causal-lm", tmp_path, skip=True)


def test_an_empty_prompt_is_a_prompt(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"prompt": "", "completion": "a"}])
    assert checked("rows.jsonl", "causal-lm", tmp_path).dataset[0]["prompt"] == ""


def test_conversations_are_kept_as_they_are(write: Write, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 0.1 + 0.2, "b": None, "c": [1, "x"]}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"z": "é"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "number"}}}}]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools},
        {"messages": [USER, {"role": "assistant", "tool_calls": [other]}, {"role": "tool", "content": ""}, SAID]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                SAID,
            ]
        },
    ]
    dataset = checked(write("rows.jsonl", rows), "causal-lm", tmp_path).dataset
    assert dataset[0]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert dataset[1]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [other]}
    assert dataset[2]["messages"][0] == {"role": "user", "content": "ab"}
    assert dataset["tools"][:] == [tools, None, None]


def test_tools_may_be_written_as_text(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{**CHAT, "tools": '[{"name": "f"}]'}, {**CHAT, "tools": ""}])
    assert checked("rows.jsonl", "causal-lm", tmp_path).dataset["tools"][:] == [[{"name": "f"}], None]


def test_what_arrow_adds_to_messages_is_taken_away(tmp_path: Path) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, SAID]
    dataset = checked(Dataset.from_list([{"messages": messages}]), "causal-lm", tmp_path).dataset
    assert dataset[0]["messages"] == [USER, {**messages[1], "content": ""}, SAID]


def test_prompts_and_completions_of_messages(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"prompt": [USER, SAID, USER], "completion": [SAID], "tools": [{"name": "f"}]}])
    row = checked("rows.jsonl", "causal-lm", tmp_path).dataset[0]
    assert (row["messages"], row["context"], row["tools"]) == ([USER, SAID, USER, SAID], 3, [{"name": "f"}])
    write("rows.jsonl", [{"prompt": [USER], "completion": [SAID]}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: field 'prompt': expected a list of messages, found text"):
        checked("rows.jsonl", "causal-lm", tmp_path)


def test_families_become_groups(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"text": "a", "family": "x"}, {"text": "b"}, {"text": "c", "family": 3}])
    assert checked("rows.jsonl", "causal-lm", tmp_path).dataset["group"][:] == ["x", None, "3"]


def test_keys_are_equal_for_exact_duplicates_only(write: Write, tmp_path: Path) -> None:
    same = [{"prompt": "a", "completion": "bc"}, {"completion": "bc", "prompt": "a"}]
    same += [{"prompt": "ab", "completion": "c"}, {"prompt": "bc", "completion": "a"}]
    keys = checked(write("rows.jsonl", same), "causal-lm", tmp_path).keys
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3
    labelled = [{"text": "a", "label": 0}, {"text": "a", "label": 1}]
    keys = checked(write("rows.jsonl", labelled), "text-classification", tmp_path).keys
    assert keys[0] == keys[1]
