"""Conversations: loss on the assistant's words and the end of its turns, by each of the three ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inputs.conftest import CHATML, byte_level, learned, pairs, prepare
from tests.inputs.test_text import TOKENIZERS
from tunesmith.errors import DataError
from tunesmith.inputs.chat import ChatTemplate, with_system

Write = Callable[..., str]
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}",
)
# Shows what an assistant thought only in its last turn, as reasoning models do.
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}")
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def talk(*said: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if at % 2 else "user", "content": words} for at, words in enumerate(said)]


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_level(pad_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer: Any, row: Any) -> tuple[str, str]:
    return tokenizer.decode(row.ids), tokenizer.decode([label for label in row.labels if label != -100])


def test_which_tokens_carry_loss_by_markers() -> None:
    tokenizer = tokenizer_with(MARKED)
    chat = ChatTemplate(tokenizer, "Rows")
    row = chat.encode(talk("a", "b", "c", "d"), None, 0)
    assert chat.method == "the template's generation markers"
    assert parts(tokenizer, row) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
        "b<|im_end|>d<|im_end|>",
    )
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "d<|im_end|>\n"
    assert chat.stops


def test_which_tokens_carry_loss_by_differences(chatml: Any) -> None:
    chat = ChatTemplate(chatml, "Rows")
    row = chat.encode(talk("a", "b", "c", "d"), None, 0)
    assert chat.method == "differences between turns"
    assert parts(chatml, row)[1] == "b<|im_end|>\nd<|im_end|>\n"
    assert chatml.decode(row.ids[: row.prompt_length]).endswith(
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_trls_training_template_is_used_where_there_is_one() -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tokenizer_with(qwen2_5_chat_template)
    chat = ChatTemplate(tokenizer, "Rows")
    assert chat.method == "TRL's training template"
    row = chat.encode(talk("a", "b"), None, 0)
    assert parts(tokenizer, row)[1].strip() == "b<|im_end|>"
    assert chat.stops


words = st.text("abc xyz.", min_size=1, max_size=8).filter(str.strip)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
@pytest.mark.parametrize("way", ["markers", "differences", "embedded"])
def test_the_labels_are_what_the_assistant_says(way: str, turns: list[tuple[str, str]], system: bool) -> None:
    tokenizer = TOKENIZERS["embedded"] if way == "embedded" else tokenizer_with(MARKED if way == "markers" else CHATML)
    end = {"markers": "<|im_end|>", "differences": "<|im_end|>\n", "embedded": tokenizer.eos_token}[way]
    messages = with_system(talk(*(part for turn in turns for part in turn)), "Be brief." if system else None)
    row = ChatTemplate(tokenizer, "Rows").encode(messages, None, 0)
    whole, said = parts(tokenizer, row)
    assert said == "".join(answer + end for _, answer in turns)
    assert row.ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert ("Be brief." in whole) == system


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_earlier_turns_of_a_prompt_carry_no_loss(template: str) -> None:
    tokenizer = tokenizer_with(template)
    row = ChatTemplate(tokenizer, "Rows").encode(talk("a", "b", "c", "d"), None, 3)
    assert parts(tokenizer, row)[1].strip() == "d<|im_end|>"


def test_a_template_that_forgets_cannot_be_told_apart() -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    chat = ChatTemplate(tokenizer, "Rows")
    assert parts(tokenizer, chat.encode(talk("a", "hm|b"), None, 0))[1].strip() == "hm|b<|im_end|>"
    with pytest.raises(DataError, match=r"shows an earlier turn differently .* {% generation %} .*`data.loss_on: all`"):
        chat.encode(talk("a", "hm|b", "c", "d"), None, 0)
    assert chat.encode(talk("a", "hm|b", "c", "d"), None, 0, everything=True).ids


def test_a_template_that_leaves_the_answer_out() -> None:
    tokenizer = tokenizer_with(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"or leaves parts of it out"):
        ChatTemplate(tokenizer, "Rows").encode(talk("a", "b"), None, 0)


def test_a_template_that_puts_a_header_only_when_asked_late() -> None:
    # It ignores `add_generation_prompt`: the header of the answer then belongs to the answer.
    tokenizer = tokenizer_with(CHATML.split("{% if add_generation_prompt")[0])
    row = ChatTemplate(tokenizer, "Rows").encode(talk("a", "b"), None, 0)
    assert parts(tokenizer, row)[1] == "<|im_start|>assistant\nb<|im_end|>\n"


def test_a_model_that_would_not_learn_to_stop_is_told(write: Write, roomy: Any) -> None:
    unended = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    write("r.jsonl", [{"messages": talk(f"a{i}", "b")} for i in range(4)])
    notes = prepare(roomy, tokenizer_with(unended), train="r.jsonl").report["notes"]
    assert any("leaves the token that ends a turn without loss" in note for note in notes)
    notes = prepare(roomy, tokenizer_with(MARKED), train="r.jsonl").report["notes"]
    assert notes == [
        "the assistant's tokens of train are told by the template's generation markers",
        "the assistant's tokens of eval are told by the template's generation markers",
    ]


def test_rows_that_the_template_refuses(write: Write, roomy: Any, embedded: Any) -> None:
    good = {"messages": talk("a", "b")}
    write("r.jsonl", [good, good, {"messages": [*talk("a", "b"), {"role": "tool", "content": "c"}, talk("", "d")[1]]}])
    write("e.jsonl", [good])
    message = "^r.jsonl:3: the chat template refuses it: The role must be system, user or assistant, found tool"
    with pytest.raises(DataError, match=message):
        prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl")
    report = prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl", skip_bad_rows=True).report
    assert report["sources"]["train"]["bad_rows"]["kinds"] == {"template": 1}
    assert report["train"]["rows"] == 2
    with pytest.raises(DataError, match=r"System role not supported"):
        prepare(roomy, tokenizer_with(STRICT), train="e.jsonl", eval="e.jsonl", system="Be brief.")


def test_no_template(write: Write, roomy: Any, merging: Any) -> None:
    write("r.jsonl", [{"messages": talk("a", "b")}] * 3)
    with pytest.raises(
        DataError, match=r"Rows with messages need a chat template, and the tokenizer has none. Use a model"
    ):
        prepare(roomy, merging, train="r.jsonl")
    write("r.jsonl", pairs(3))
    with pytest.raises(DataError, match=r"Rows under `data.chat: always` need a chat template"):
        prepare(roomy, merging, train="r.jsonl", chat="always")


def test_chat_always_turns_prompts_into_turns(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", pairs(4))
    found = prepare(roomy, embedded, train="r.jsonl", chat="always", system="Hm.", split_seed=0)
    row, said = found.eval[0], found.rows["eval"][0]
    assert embedded.decode(row["input_ids"]) == (
        f"<|system|>Hm.<|user|>{said['prompt']}<|assistant|>{said['completion']}{embedded.eos_token}"
    )
    assert embedded.decode(learned(row)) == said["completion"] + embedded.eos_token
    plain = prepare(roomy, embedded, train="r.jsonl").eval[0]
    assert embedded.decode(plain["input_ids"]) == said["prompt"] + said["completion"] + embedded.eos_token


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"messages": talk("a", "b")}] * 3, {"chat": "never"}, "data.chat is never, but the rows are conversations"),
        ([{"text": "a"}] * 3, {"chat": "always"}, "data.chat is always, but the rows are plain text"),
        ([{"text": "a"}] * 3, {"system": "Hm."}, "data.system needs a chat template, and these rows do not go through"),
        (pairs(3), {"system": "Hm."}, "Set `data.chat: always`, or put the words into the prompts"),
    ],
)
def test_settings_that_do_not_fit_the_rows(
    write: Write, roomy: Any, embedded: Any, rows: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(roomy, embedded, train=write("r.jsonl", rows), **fields)


def test_rows_with_a_system_message_keep_theirs(write: Write, roomy: Any, embedded: Any) -> None:
    own = [{"role": "system", "content": "Mine."}, *talk("a", "b")]
    write("r.jsonl", [{"messages": own}, {"messages": own}])
    text = embedded.decode(prepare(roomy, embedded, train="r.jsonl", system="Yours.").train[0]["input_ids"])
    assert text.startswith("<|system|>Mine.<|user|>a")


def test_tools_reach_the_template(write: Write, roomy: Any) -> None:
    tokenizer = tokenizer_with("{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + MARKED)
    write(
        "r.jsonl", [{"messages": talk("a", "b"), "tools": [{"name": "f"}, {"name": "g"}]}, {"messages": talk("c", "d")}]
    )
    write("e.jsonl", [{"messages": talk("a", "b")}])
    found = prepare(roomy, tokenizer, train="r.jsonl", eval="e.jsonl").train
    assert tokenizer.decode(found[0]["input_ids"]).startswith("[f][g]<|im_start|>user\na")
    assert tokenizer.decode(found[1]["input_ids"]).startswith("<|im_start|>user\nc")


def test_prompts_of_messages_carry_no_loss(write: Write, roomy: Any, embedded: Any) -> None:
    row = {"prompt": talk("a", "b", "c"), "completion": talk("", "d")[1:]}
    write("r.jsonl", [row, row])
    for fields, expected in (({}, "d<|eos|>"), ({"system": "Hm."}, "d<|eos|>")):
        found = prepare(roomy, embedded, train="r.jsonl", **fields).train[0]
        assert embedded.decode(learned(found)) == expected
    earlier = {"prompt": talk("a", "b"), "completion": talk("c", "d")}
    write("e.jsonl", [earlier])
    found = prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl", system="Hm.").eval[0]
    assert embedded.decode(learned(found)) == "d<|eos|>"
    everything = prepare(roomy, embedded, train="r.jsonl", loss_on="all").train[0]
    assert everything["labels"] == everything["input_ids"]
    assert embedded.decode(everything["input_ids"][everything["prompt_length"] :]) == "d<|eos|>"
