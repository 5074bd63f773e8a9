"""Which columns mean what, which task they are for, and what is said where neither is clear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from tests.inputs.conftest import pairs, prepare
from tests.zoo import tiny
from tunesmith.errors import DataError
from tunesmith.inputs import infer_task, read_rows
from tunesmith.inputs.columns import meaning
from tunesmith.inputs.task import check_task

Write = Callable[..., str]


def raw(*columns: str, what: str = "data.train") -> Any:
    return read_rows(Dataset.from_dict({column: ["x"] for column in columns}), what=what)


def error_of(columns: tuple[str, ...], task: Any = "causal-lm", mapping: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        meaning(raw(*columns), task, mapping or {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "columns", "shape", "ignored"),
    [
        ("causal-lm", ("text", "id"), ("text",), ("id",)),
        ("causal-lm", ("prompt", "completion"), ("prompt", "completion"), ()),
        ("causal-lm", ("prompt", "messages"), ("messages",), ("prompt",)),
        ("seq2seq", ("prompt", "completion", "text"), ("prompt", "completion"), ("text",)),
        ("text-classification", ("text", "label", "prompt"), ("text", "label"), ("prompt",)),
        ("image-classification", ("image", "label"), ("image", "label"), ()),
    ],
)
def test_our_names_need_no_mapping(task: Any, columns: tuple[str, ...], shape: Any, ignored: Any) -> None:
    found = meaning(raw(*columns), task, {})
    assert (found.shape, found.ignored) == (shape, ignored)


def test_a_mapping_renames_and_the_rest_is_ignored() -> None:
    mapping = {"prompt": "q", "completion": "a", "family": "topic"}
    found = meaning(raw("q", "a", "topic", "prompt", "id"), "causal-lm", mapping)
    assert found.theirs == mapping
    assert found.ignored == ("prompt", "id")


def test_a_swap_of_two_names() -> None:
    found = meaning(raw("prompt", "completion"), "causal-lm", {"prompt": "completion", "completion": "prompt"})
    assert found.theirs == {"prompt": "completion", "completion": "prompt"}


def test_a_column_that_is_mapped_is_not_read_twice() -> None:
    message = error_of(("prompt", "id"), mapping={"completion": "prompt"})
    assert "`columns: {completion: prompt}`" not in message
    assert "its columns are prompt, id; causal-lm takes" in message


def test_the_mapping_decides_between_two_shapes() -> None:
    columns = ("prompt", "completion", "text")
    assert error_of(columns) == (
        "data.train: its columns can be read in 2 ways, as `prompt` + `completion` and as `text`. Write which one is "
        "meant: `columns: {prompt: prompt, completion: completion}` or `columns: {text: text}`."
    )
    assert meaning(raw(*columns), "causal-lm", {"text": "text"}).shape == ("text",)


def test_names_that_are_only_alike_are_suggested_not_taken() -> None:
    assert error_of(("question", "answer", "id")) == (
        "data.train: its columns are question, answer, id; causal-lm takes `messages`, or `prompt` + `completion`, or "
        "`text`. If a column is one of these under another name, say so in the recipe, for example "
        "`columns: {prompt: question, completion: answer}`."
    )
    assert "`columns: {messages: conversations}`" in error_of(("conversations", "id"))
    assert "`columns: {text: review, label: sentiment}`" in error_of(("review", "sentiment"), "text-classification")
    assert "`columns: {image: file_name, label: label}`" in error_of(("file_name", "label"), "image-classification")
    assert "`columns: {text: YOUR_COLUMN}`" in error_of(("zzz",))


def test_mappings_of_what_does_not_exist() -> None:
    columns = ("question", "answer")
    assert error_of(columns, mapping={"promt": "question"}).startswith(
        "data.columns: 'promt' is none of our names. Did you mean 'prompt'? They are: prompt, completion,"
    )
    assert "so perhaps `prompt: question`" in error_of(columns, mapping={"question": "prompt"})
    assert error_of(columns, mapping={"prompt": "qestion"}) == (
        "data.columns: prompt is mapped to 'qestion', but data.train has no such column. Did you mean 'question'? It "
        "has: question, answer."
    )


def test_evaluation_rows_may_have_our_names_already() -> None:
    mapping = {"prompt": "q", "completion": "a"}
    found = meaning(raw("prompt", "completion", what="data.eval"), "causal-lm", mapping)
    assert found.theirs == {"prompt": "prompt", "completion": "completion"}
    with pytest.raises(DataError, match=r"mapped to 'a'"):
        meaning(raw("q", "completion", what="data.eval"), "causal-lm", mapping)


@pytest.mark.parametrize(
    ("family", "columns", "task"),
    [
        ("llama", ("prompt", "completion"), "causal-lm"),
        ("gpt2", ("messages",), "causal-lm"),
        ("opt", ("something",), "causal-lm"),
        ("t5", ("prompt", "completion"), "seq2seq"),
        ("bert", ("text", "label"), "text-classification"),
        ("vit", ("image", "label"), "image-classification"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_the_model_tells_the_task(family: str, columns: tuple[str, ...], task: str, declared: bool) -> None:
    model = tiny(family)
    model.config.architectures = [type(model).__name__] if declared else None
    assert infer_task(model.config, columns) == task


def test_a_language_model_with_texts_and_labels_is_asked_about(lm: Any) -> None:
    with pytest.raises(DataError, match=r"`task: text-classification` .* or `task: causal-lm`"):
        infer_task(lm, ("text", "label"))


def test_models_and_rows_that_contradict_each_other(lm: Any, bert: Any, vit: Any, t5: Any) -> None:
    with pytest.raises(DataError) as caught:
        infer_task(lm, ("image", "label"))
    assert str(caught.value) == (
        "The model is LlamaForCausalLM, for causal-lm, which takes `messages`, or `prompt` + `completion`, or `text`; "
        "the rows are for image-classification (label, image). Use rows or a model of the other kind."
    )
    for config, columns in ((vit, ("text",)), (bert, ("messages",)), (t5, ("image", "label"))):
        with pytest.raises(DataError, match=r"the rows are for"):
            infer_task(config, columns)


def test_a_task_that_the_architecture_cannot_do(vit: Any, lm: Any) -> None:
    with pytest.raises(
        DataError, match=r"task: seq2seq is not possible with LlamaForCausalLM; .* does causal-lm, text-"
    ):
        check_task(lm, "seq2seq")
    check_task(lm, "text-classification")
    with pytest.raises(DataError, match=r"task: causal-lm is not possible with ViTForImageClassification"):
        check_task(vit, "causal-lm")


def test_a_model_for_none_of_the_tasks() -> None:
    from transformers import WhisperConfig

    with pytest.raises(DataError, match=r"which none of the tasks causal-lm, seq2seq, .* is for. Write `task"):
        infer_task(WhisperConfig(architectures=["WhisperForConditionalGeneration"]), ("text",))


def test_ignored_columns_are_listed(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [{**row, "id": 3, "tools": None} for row in pairs(4)])
    source = prepare(roomy, embedded, train="r.jsonl").report["sources"]["train"]
    assert source["ignored_columns"] == ["id", "tools"]
    assert source["shape"] == "prompt + completion"
