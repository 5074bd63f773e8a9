"""Labels cover exactly the completion and its end, whatever the text and the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.inputs.conftest import byte_level, sentencepiece_like
from tests.zoo import tiny
from tunesmith.errors import DataError
from tunesmith.inputs.text import PlainText, end_token, surroundings
from tunesmith.models.embedded import WEIGHTS

CONFIG = tiny("llama").config
TOKENIZERS: dict[str, Any] = {"merging": byte_level(), "llama-like": sentencepiece_like()}
anything = st.text(st.characters(codec="utf-8", exclude_characters="<▁"), max_size=30)
plain_words = st.text("abcdefgh tor.:?\n", max_size=30)


def said(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def embedded_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer")


TOKENIZERS["embedded"] = embedded_tokenizer()


@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("name", ["embedded", "merging"])
@given(prompt=anything, completion=anything.filter(str.strip))
@example(prompt="yes n", completion="o")
@example(prompt="the", completion=" cat")
@example(prompt="é"[:1], completion="́ combined")
def test_the_labels_are_the_completion_and_its_end(name: str, prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = PlainText(tokenizer, CONFIG).pairs([prompt], [completion])[0]
    assert isinstance(row.labels, list)
    learned = row.ids[row.prompt_length :]
    assert row.labels == [-100] * (len(row.ids) - len(learned)) + learned
    assert learned[-1] == tokenizer.eos_token_id
    assert learned.count(tokenizer.eos_token_id) == 1
    assert said(tokenizer, learned) == completion + tokenizer.eos_token
    assert said(tokenizer, row.ids) == prompt + completion + tokenizer.eos_token
    assert row.ids[: row.prompt_length] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=150)
@given(prompt=plain_words, completion=plain_words.filter(str.strip))
@example(prompt="Question: what? Answer: ", completion="that")
@example(prompt="Question: what? Answer:", completion=" that")
@example(prompt="", completion="that")
def test_no_space_is_added_by_tokenizers_that_put_one_before_a_text(prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS["llama-like"]
    row = PlainText(tokenizer, CONFIG).pairs([prompt], [completion])[0]
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.bos_token_id) == row.ids.count(tokenizer.eos_token_id) == 1
    assert said(tokenizer, row.ids[1:-1]) == said(tokenizer, tokenizer(prompt + completion).input_ids[1:-1])
    learned = [label for label in row.labels if label != -100]  # type: ignore[union-attr]
    assert learned == row.ids[row.prompt_length :]
    # What it decodes to alone loses a leading space; behind the prompt it must not.
    before = said(tokenizer, row.ids[1 : row.prompt_length])
    assert said(tokenizer, row.ids[1:-1])[len(before) :].strip() == completion.strip()


def test_tokens_do_not_cross_the_boundary(merging: Any) -> None:
    together = merging("yes no", add_special_tokens=False)["input_ids"]
    alone = merging("yes n", add_special_tokens=False)["input_ids"]
    assert together[: len(alone)] != alone, "the example needs a token that crosses"
    row = PlainText(merging, CONFIG).pairs(["yes n"], ["o"])[0]
    assert row.parted
    assert row.ids[: len(alone)] == alone
    assert not PlainText(merging, CONFIG).pairs(["the"], ["\n"])[0].parted


def test_texts_end_once_and_begin_as_the_tokenizer_begins_them(embedded: Any, llama_like: Any) -> None:
    first, second = PlainText(embedded, CONFIG).texts(["a", "a" + embedded.eos_token])
    assert first.ids == second.ids == first.labels == [*embedded("a")["input_ids"], embedded.eos_token_id]
    plain, led = PlainText(llama_like, CONFIG).texts(["cat", "<s>cat"])
    assert plain.ids[0] == 1
    assert led.ids.count(1) == 1
    assert plain.ids.count(2) == 1


def test_a_completion_that_brings_its_own_end(embedded: Any) -> None:
    with_end, without = PlainText(embedded, CONFIG).pairs(["a", "a"], ["b" + embedded.eos_token, "b"])
    assert with_end == without


def test_what_a_tokenizer_puts_around_a_text(embedded: Any, llama_like: Any) -> None:
    assert surroundings(llama_like) == ([1], [2])
    assert surroundings(embedded) == ([], [])


def test_the_end_is_the_models_if_the_tokenizer_has_none() -> None:
    tokenizer = byte_level(eos_token=None)  # type: ignore[arg-type]
    assert tokenizer.eos_token_id is None
    assert end_token(tokenizer, CONFIG) == 2
    assert end_token(tokenizer, tiny("llama", eos_token_id=[7, 8]).config) == 7
    with pytest.raises(DataError, match=r"Neither the tokenizer nor the model names an end-of-sequence token"):
        end_token(tokenizer, tiny("llama", eos_token_id=None).config)
