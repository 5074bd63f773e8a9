"""Lengths: where the limit comes from, and what happens to rows that are longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import RobertaConfig, T5Config

from tests.inputs.conftest import learned, pairs, prepare
from tests.zoo import tiny
from tunesmith.errors import DataError
from tunesmith.inputs.limits import positions, token_limit

Write = Callable[..., str]


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (tiny("llama").config, 64),
        (tiny("gpt2").config, 64),
        (tiny("opt").config, 64),
        (tiny("bert").config, 64),
        (tiny("t5").config, None),
        (T5Config(n_positions=512), None),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    ],
)
def test_positions_of_models(config: Any, own: int | None) -> None:
    assert positions(config) == own


def test_the_smaller_limit_is_taken(lm: Any) -> None:
    assert token_limit(lm, 32).tokens == 32
    assert token_limit(lm, 64).origin == "data.max_length"
    assert token_limit(lm, 65).tokens == 64
    assert token_limit(lm, 1024).origin == "the model's own limit of 64"
    assert token_limit(lm, 1024, 10).tokens == 54
    assert token_limit(lm, 54, 10).origin == "data.max_length"
    assert token_limit(lm, 55, 10).origin == "the model's own limit of 64, less 10 virtual tokens of prompts"
    with pytest.raises(DataError, match=r"The model takes 64 tokens, less 63 virtual tokens .* no room for rows"):
        token_limit(lm, 1024, 63)


def long_row(n: int) -> dict[str, str]:
    return {"prompt": "a b c", "completion": " d" * n}


@pytest.fixture
def uneven(write: Write) -> str:
    write("e.jsonl", pairs(2))
    return write("r.jsonl", [*pairs(3), long_row(100), pairs(1, 9)[0]])


def test_longer_rows_are_dropped_and_counted(uneven: str, roomy: Any, embedded: Any) -> None:
    found = prepare(roomy, embedded, train=uneven, eval="e.jsonl", max_length=40)
    report = found.report["train"]
    assert (len(found.train), report["dropped_too_long"], report["truncated"]) == (4, 1, 0)
    assert report["longest_found"] == 104
    assert [row["prompt"] for row in found.rows["train"]] == [row["prompt"] for row in [*pairs(3), *pairs(1, 9)]]
    assert found.limit == 40
    assert found.report["limit"] == {"tokens": 40, "from": "data.max_length"}


def test_a_row_of_exactly_the_limit_stays(uneven: str, roomy: Any, embedded: Any) -> None:
    assert len(prepare(roomy, embedded, train=uneven, eval="e.jsonl", max_length=104).train) == 5
    assert len(prepare(roomy, embedded, train=uneven, eval="e.jsonl", max_length=103).train) == 4


def test_longer_rows_are_truncated_at_the_end(uneven: str, roomy: Any, embedded: Any) -> None:
    found = prepare(roomy, embedded, train=uneven, eval="e.jsonl", max_length=40, too_long="truncate")
    assert (len(found.train), found.report["train"]["truncated"]) == (5, 1)
    row = found.train[3]
    assert len(row["input_ids"]) == len(row["labels"]) == 40
    assert embedded.decode(learned(row)) == " d" * 37
    assert embedded.decode(row["input_ids"]) == "a b c" + " d" * 37


def test_longer_rows_are_an_error(uneven: str, roomy: Any, embedded: Any) -> None:
    with pytest.raises(DataError) as caught:
        prepare(roomy, embedded, train=uneven, eval="e.jsonl", max_length=40, too_long="error")
    assert str(caught.value) == (
        "r.jsonl:4: 104 tokens; at most 40 are taken (data.max_length). Raise `data.max_length`, shorten the row, or "
        "set `data.too_long` to drop or truncate."
    )


def test_a_row_without_a_label_left_is_dropped(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [*pairs(3), {"prompt": "a " * 60, "completion": "b"}])
    write("e.jsonl", pairs(2))
    report = prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl", max_length=40, too_long="truncate").report
    assert (report["train"]["rows"], report["train"]["dropped_without_label"]) == (3, 1)


def test_nothing_left(write: Write, lm: Any, embedded: Any) -> None:
    write("r.jsonl", [long_row(100), long_row(80)])
    with pytest.raises(DataError) as caught:
        prepare(lm, embedded, train="r.jsonl", eval="r.jsonl", reserved=4)
    assert str(caught.value) == (
        "r.jsonl: no row is left. 2 are longer than 60 tokens (the model's own limit of 64, less 4 virtual tokens of "
        "prompts), the longest has 104; 0 keep no label cut. Raise `data.max_length`, or set `data.too_long: truncate`."
    )


def test_loss_on_all(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", pairs(4))
    found = prepare(roomy, embedded, train="r.jsonl", loss_on="all")
    assert found.train[0]["labels"] == found.train[0]["input_ids"]
    prompt = prepare(roomy, embedded, train="r.jsonl").train[0]
    assert found.train[0]["prompt_length"] == prompt["prompt_length"] > 0
    report = found.report["train"]
    assert report["labelled_tokens"] == report["tokens"] - report["rows"], "the first token of a row is not predicted"


def test_lengths_are_reported(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [long_row(n) for n in range(1, 11)])
    write("e.jsonl", pairs(2))
    report = prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl").report["train"]
    assert report["lengths"] == {"p0": 5, "p50": 9, "p90": 13, "p99": 14, "p100": 14}
    assert report["tokens"] == sum(range(5, 15))
    assert report["labelled_tokens"] == sum(range(2, 12))
