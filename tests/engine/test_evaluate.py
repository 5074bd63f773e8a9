"""Measuring: exact numbers on models whose logits are known, and answers in their places."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.zoo import tiny
from tunesmith.core.loss import IGNORED
from tunesmith.engine import evaluate
from tunesmith.engine.measure import Measurer
from tunesmith.engine.retain import Retained
from tunesmith.inputs.batches import Pad
from tunesmith.models import embedded
from tunesmith.recipe import Recipe

LN = math.log


class Bigram(nn.Module):
    """A causal model of four tokens: after token t, the next is t + 1 (mod 4) with probability p, else uniform."""

    def __init__(self, p: float) -> None:
        super().__init__()
        rest = (1 - p) / 3
        table = torch.full((4, 4), rest).scatter(1, ((torch.arange(4) + 1) % 4)[:, None], p)
        self.table = nn.Parameter(table.log())

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, logits_to_keep]])


class Fixed(nn.Module):
    """A classifier that reads its logits from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=pixel_values * self.scale)


def row(ids: list[int], answer: int, **more: Any) -> dict[str, Any]:
    """A row whose last `answer` tokens carry loss."""
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - answer) + ids[-answer:], **more}


def test_causal_loss_is_the_mean_over_labelled_tokens() -> None:
    right, wrong = -LN(0.7), -LN(0.1)
    rows = [row([0, 1, 2, 3], 2), row([0, 1, 3], 1), row([3, 2], 1)]
    expected = (2 * right + wrong + wrong) / 4
    for size in (1, 2, 3):
        found = evaluate.metrics(Bigram(0.7), rows, Pad(0), "causal-lm", size)
        assert found.keys() == {"all"}
        assert found["all"]["loss"] == pytest.approx(expected, rel=1e-6)
        assert found["all"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)


def test_groups_are_measured_apart_in_their_order() -> None:
    rows = [row([0, 1], 1, group="b"), row([0, 2], 1, group="a"), row([0, 2], 1, group="b"), row([1, 2], 1, group=None)]
    found = evaluate.metrics(Bigram(0.7), rows, Pad(0), "causal-lm", 8)
    assert list(found) == ["b", "a", "all"]
    assert found["b"]["loss"] == pytest.approx(-(LN(0.7) + LN(0.1)) / 2, rel=1e-6)
    assert found["a"]["loss"] == pytest.approx(-LN(0.1), rel=1e-6)
    assert found["all"]["loss"] == pytest.approx(-LN(0.7), rel=1e-6)


def test_accuracy_and_loss_of_classes_are_means_over_rows() -> None:
    logits = [[LN(8), 0.0, 0.0], [0.0, LN(2), 0.0], [0.0, 0.0, LN(18)]]
    rows = [{"pixel_values": torch.tensor(x), "labels": label} for x, label in zip(logits, (0, 0, 2), strict=True)]

    def collate(chosen: Any) -> dict[str, Tensor]:
        labels = torch.tensor([entry["labels"] for entry in chosen])
        return {"pixel_values": torch.stack([entry["pixel_values"] for entry in chosen]), "labels": labels}

    for size in (1, 2, 8):
        found = evaluate.metrics(Fixed(), rows, collate, "image-classification", size)["all"]
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["loss"] == pytest.approx((LN(10 / 8) + LN(4) + LN(20 / 18)) / 3, rel=1e-6)
        assert "perplexity" not in found


@torch.no_grad()
def test_seq2seq_loss_is_the_mean_over_target_tokens() -> None:
    model = tiny("t5")
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 2]}, {"input_ids": [9], "labels": [4]}]
    losses = [
        model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.item() for r in rows
    ]
    found = evaluate.metrics(model, rows, Pad(0), "seq2seq", 2)["all"]
    assert found["loss"] == pytest.approx((3 * losses[0] + losses[1]) / 4, rel=1e-5)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = Bigram(0.7).train()
    evaluate.metrics(model, [row([0, 1], 1)], Pad(0), "causal-lm", 1)
    assert model.training
    assert model.table.grad is None


def test_a_hopeless_loss_is_still_a_number() -> None:
    model = Bigram(0.7)
    with torch.no_grad():
        model.table.mul_(1e4)
    found = evaluate.metrics(model, [row([0, 2], 1)], Pad(0), "causal-lm", 1)["all"]
    assert found["loss"] > 700
    assert math.isfinite(found["perplexity"])


# Questions and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 7, 8], ([5, 6], [7, 8])),
        ([-100, 6, -100, 8], ([5, 6, 7], [8])),
        ([-100, 6, 7, -100], ([5], [6, 7])),
        ([5, 6, 7, 8], None),
        ([-100] * 4, None),
    ],
)
def test_the_question_is_what_stands_before_the_last_answer(labels: list[int], expected: Any) -> None:
    assert evaluate.question({"input_ids": [5, 6, 7, 8], "labels": labels}, "causal-lm") == expected


def test_the_question_of_an_encoder_decoder_is_its_input() -> None:
    assert evaluate.question({"input_ids": [5, 6], "labels": [7, IGNORED]}, "seq2seq") == ([5, 6], [7])


def test_rows_to_answer_are_spread_over_the_groups() -> None:
    rows = [{"group": g} for g in "aaaabbc"]
    assert evaluate.spread(rows, 3) == [0, 4, 6]
    assert evaluate.spread(rows, 5) == [0, 1, 4, 5, 6]
    assert evaluate.spread(rows, 99) == list(range(7))
    assert evaluate.spread(rows, 0) == []
    assert evaluate.spread([{}, {}, {}], 2) == [0, 1]
    assert evaluate.spread([], 5) == []


def test_exact_match_ignores_surrounding_space_alone() -> None:
    rows = [{"group": "a"}, {"group": "a"}, {"group": "b"}, {}]
    found = evaluate.exact_match(rows, [0, 1, 2, 3], [" x\n", "X", "y", "z"], ["x", "x", "y", "z z"])
    assert found == {"a": 0.5, "b": 1.0, "all": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.path("tokenizer"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_batched_answers_are_those_given_one_by_one_in_their_order(tokenizer: Any, family: str) -> None:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = tiny(family, vocab_size=len(tokenizer), **ids)
    prompts = [tokenizer(text)["input_ids"] for text in ("abc def ghi jkl", "a", "abc de: ", "zz zz zz zz zz zz", "q")]
    options = {"max_new_tokens": 5, "task": "seq2seq" if family == "t5" else "causal-lm"}
    batched = evaluate.answers(model.train(), tokenizer, prompts, batch_size=3, **options)
    assert model.training
    alone = [evaluate.answers(model, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert batched == alone
    assert len(set(batched)) > 1


def test_answers_end_where_the_model_does(tokenizer: Any) -> None:
    model = tiny("gpt2", vocab_size=len(tokenizer), eos_token_id=None, n_positions=12)
    prompts = [list(range(300, 309))]
    options = {"max_new_tokens": 50, "batch_size": 4, "task": "causal-lm"}
    found = evaluate.answers(model, tokenizer, prompts, limit=12, **options)
    shorter = evaluate.answers(model, tokenizer, prompts, **{**options, "max_new_tokens": 3})
    assert found == shorter
    assert evaluate.answers(model, tokenizer, prompts, limit=12, **{**options, "max_new_tokens": 2}) != found


# The measurer -----------------------------------------------------------------------------------------------------


def measurer(rows: list[dict[str, Any]], retained: Retained | None, tokenizer: Any, **report: Any) -> Measurer:
    recipe = Recipe(report={"max_new_tokens": 4, **report}, train={"batch_size": 2})
    data = SimpleNamespace(eval=rows, limit=256, collator=Pad(tokenizer.pad_token_id))
    return Measurer(recipe, data, retained, tokenizer, "causal-lm")


@torch.no_grad()
def test_the_measurer_answers_and_tells_what_was_right(tokenizer: Any) -> None:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = tiny("llama", vocab_size=len(tokenizer), **ids)
    prompt = tokenizer("abc: ")["input_ids"]
    said = evaluate.answers(model, tokenizer, [prompt], max_new_tokens=4, batch_size=1, task="causal-lm")[0]
    right = tokenizer(said, add_special_tokens=False)["input_ids"]
    wrong = tokenizer("no", add_special_tokens=False)["input_ids"]
    rows = [
        {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer, "group": group}
        for answer, group in ((right, "a"), (wrong, "a"), (wrong, "b"))
    ]
    known = Retained(rows[:1], True, "what it said")
    found = measurer(rows, known, tokenizer, generate_rows=3).measure(model)
    assert found["match"] == {"a": 0.5, "b": 0.0}
    assert [entry["row"] for entry in found["answers"]] == [0, 1, 2]
    assert [entry["text"] for entry in found["answers"]] == [said] * 3
    assert {entry["expected"] for entry in found["answers"]} == {said, "no"}
    assert all(entry["prompt"].endswith("abc: ") for entry in found["answers"])
    assert found["retained"]["match"] == {"a": 1.0}
    assert found["metrics"] == evaluate.metrics(model, rows, Pad(tokenizer.pad_token_id), "causal-lm", 2)


def test_nothing_is_generated_where_there_is_nothing_to_generate(tokenizer: Any) -> None:
    text = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    # These rows have a question, but were kept for their perplexity alone.
    known = Retained([row([5, 6, 7], 1)], False, "text")
    found = measurer(text, known, tokenizer, generate_rows=3).measure(tiny("llama", vocab_size=len(tokenizer)))
    assert (found["answers"], found["match"]) == ([], {})
    assert found["retained"]["answers"] == []
    assert found["retained"]["metrics"]["all"]["perplexity"] > 1
    none = measurer(text, None, tokenizer, generate_rows=0).measure(tiny("llama", vocab_size=len(tokenizer)))
    assert "retained" not in none


# What the model knew ----------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(tokenizer: Any, data_file: Path, model_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """`(recipe fields) -> (recipe, encoded rows, config)`."""
    from tunesmith import inputs
    from tunesmith.models.loader import read_config

    def make(**fields: Any) -> Any:
        data = {"train": str(data_file), **fields.pop("data", {})}
        recipe = Recipe(**{"model": str(model_folder("llama")), "data": data, **fields})
        config = read_config(str(model_folder("llama")))
        prepared = inputs.prepare(recipe.data, config=config, processor=tokenizer, task="causal-lm")
        return recipe, prepared, config

    return make


def test_the_users_own_rows_come_first(encoded: Any, tokenizer: Any, data_file: Path) -> None:
    from tunesmith.engine import retain

    recipe, data, config = encoded(data={"retain": str(data_file)}, report={"retain_rows": 5})
    found = retain.rows(recipe, data, tokenizer, config)
    assert found is not None
    assert (len(found.rows), found.generate, found.what) == (5, True, str(data_file))
    assert found.rows == [data.retain[i] for i in range(5)]


def test_any_other_language_model_is_measured_on_running_text(encoded: Any, tokenizer: Any) -> None:
    from tunesmith.engine import retain

    recipe, data, config = encoded(report={"retain_rows": 3})
    found = retain.rows(recipe, data, tokenizer, config)
    assert found is not None
    assert (len(found.rows), found.generate) == (3, False)
    assert all(len(entry["input_ids"]) <= data.limit for entry in found.rows)
    assert all(evaluate.question(entry, "causal-lm") is None for entry in found.rows)
    assert found == retain.rows(recipe, data, tokenizer, config), "the same rows every time"


def test_an_embedded_model_is_measured_on_what_it_was_trained_on(encoded: Any, tokenizer: Any) -> None:
    from tunesmith.engine import retain

    recipe, data, config = encoded(report={"retain_rows": 6})
    found = retain.rows(recipe.model_copy(update={"model": Recipe().model}), data, tokenizer, config)
    assert found is not None
    assert (len(found.rows), found.generate) == (6, True)
    assert len(evaluate.groups_of(found.rows)) > 1
    assert all(evaluate.question(entry, "causal-lm") for entry in found.rows)
