"""Whole runs of each task, groups, rows behind the tokens, retained rows, selection, and the embedded data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from tests.inputs.conftest import learned, pairs, prepare
from tests.zoo import tiny
from tunesmith import inputs
from tunesmith.errors import DataError

Write = Callable[..., str]


def test_seq2seq(write: Write, embedded: Any) -> None:
    model = tiny("t5", vocab_size=len(embedded))
    model.config.architectures = ["T5ForConditionalGeneration"]
    write("r.jsonl", [{"prompt": f"a b {i}", "completion": f"c {i} d e f"} for i in range(6)])
    found = prepare(model.config, embedded, train="r.jsonl")
    assert found.task == "seq2seq"
    assert found.train.column_names == ["input_ids", "labels"]
    row, said = found.eval[0], found.rows["eval"][0]
    assert embedded.decode(row["input_ids"]) == said["prompt"] + embedded.eos_token
    assert embedded.decode(row["labels"]) == said["completion"] + embedded.eos_token
    batch = found.collator([found.train[at] for at in range(4)])
    assert model(**batch).loss.isfinite()


def test_seq2seq_takes_the_tokenizers_own_marks_and_keeps_them_when_cut(write: Write, t5: Any, llama_like: Any) -> None:
    write("r.jsonl", [{"prompt": "the cat sat " * 20, "completion": "yes no " * 20}] * 2)
    found = prepare(t5, llama_like, train="r.jsonl", max_length=10, too_long="truncate").train[0]
    for ids in (found["input_ids"], found["labels"]):
        assert (len(ids), ids[0], ids[-1], ids.count(2)) == (10, 1, 2, 1)
    whole = prepare(t5, llama_like, train="r.jsonl").train[0]
    assert whole["input_ids"] == llama_like("the cat sat " * 20)["input_ids"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_text_classification(write: Write, embedded: Any, family: str) -> None:
    import transformers as T

    config = tiny(family, vocab_size=len(embedded), num_labels=3).config
    model = {"bert": T.BertForSequenceClassification, "llama": T.LlamaForSequenceClassification}[family](config)
    write("r.jsonl", [{"text": f"text {i} " + "a " * i, "label": "abc"[i % 3], "family": "x"} for i in range(12)])
    found = prepare(config, embedded, train="r.jsonl", task="text-classification")
    assert found.train.column_names == ["input_ids", "labels", "group"]
    assert found.labels == ["a", "b", "c"]
    assert found.report["train"]["labelled_tokens"] == len(found.train)
    assert model(**found.collator([found.train[at] for at in range(5)])).loss.isfinite()


def test_long_texts_of_a_classification_keep_their_marks(write: Write, bert: Any, llama_like: Any) -> None:
    write("r.jsonl", [{"text": "the cat sat " * 30, "label": i % 2} for i in range(4)])
    row = prepare(bert, llama_like, train="r.jsonl", too_long="truncate").train[0]["input_ids"]
    assert (len(row), row[0], row[-1]) == (64, 1, 2)
    with pytest.raises(DataError, match=r"no row is left"):
        prepare(bert, llama_like, train="r.jsonl")


def test_groups_and_rows_stay_beside_the_tokens(
    write: Write, roomy: Any, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("tunesmith.inputs.encode"), "_BATCH", 3)
    rows = [{**row, "topic": "ab"[at % 2]} for at, row in enumerate(pairs(8))]
    rows.insert(3, {"prompt": "x " * 50, "completion": "y", "topic": "b"})
    write("r.jsonl", rows)
    found = prepare(
        roomy, embedded, train="r.jsonl", eval="r.jsonl", max_length=40, columns={"family": "topic"}, retain="r.jsonl"
    )
    for use, tokens in (("eval", found.eval), ("retain", found.retain), ("train", found.train)):
        assert tokens is not None
        assert len(tokens) == len(found.rows[use]) == 8
        for encoded, row in zip(tokens, found.rows[use], strict=True):
            assert encoded["group"] == row["group"]
            text = embedded.decode(encoded["input_ids"][: encoded["prompt_length"]])
            assert text == row["prompt"]
            assert embedded.decode(learned(encoded)) == row["completion"] + embedded.eos_token


def test_retained_rows_go_through_the_same_reader(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4)
    write("old.jsonl", [{"text": "what it knew"}, {"text": ""}])
    with pytest.raises(DataError, match=r"^old.jsonl:2: field 'text': expected text, found an empty text"):
        prepare(roomy, embedded, train="r.jsonl", retain="old.jsonl")
    found = prepare(roomy, embedded, train="r.jsonl", retain="old.jsonl", skip_bad_rows=True, system="Hm.")
    assert found.retain is not None
    assert embedded.decode(found.retain[0]["labels"]) == "what it knew<|eos|>"
    assert found.report["sources"]["retain"]["bad_rows"]["count"] == 1
    with pytest.raises(DataError, match=r"data.retain: there is no file or folder 'older.jsonl'. Did you mean 'old"):
        prepare(roomy, embedded, train="r.jsonl", retain="older.jsonl")


def test_selection_sees_the_checked_rows(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [{"q": row["prompt"], "a": row["completion"]} for row in pairs(10)])

    def shout(rows: Dataset) -> Dataset:
        return Dataset.from_dict({"prompt": rows["prompt"][:3], "completion": ["!"] * 3})

    columns = {"prompt": "q", "completion": "a"}
    found = prepare(roomy, embedded, train="r.jsonl", columns=columns, select=shout)
    assert [embedded.decode(learned(row)) for row in found.train] == ["!<|eos|>"] * 3
    assert found.report["selected"] == [{"part": "select", "from": 9, "to": 3}]
    with pytest.raises(DataError, match=r"data.select: no training row is left after it"):
        prepare(roomy, embedded, train="r.jsonl", columns=columns, select=lambda rows: rows.select([]))


def test_bad_rows_of_both_passes_are_in_the_report(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", [*pairs(4), "no", {"prompt": "a", "completion": 3}, {"prompt": "a"}])
    write("e.jsonl", pairs(2))
    source = prepare(roomy, embedded, train="r.jsonl", eval="e.jsonl", skip_bad_rows=True).report["sources"]["train"]
    assert source["rows_read"] == 7
    assert source["bad_rows"]["count"] == 3
    assert source["bad_rows"]["kinds"] == {"unreadable": 1, "type": 1, "missing": 1}
    assert source["bad_rows"]["first"][1] == {
        "where": "r.jsonl:6",
        "reason": "field 'completion': expected text, found a number",
    }


def test_the_embedded_data(roomy: Any, embedded: Any) -> None:
    train, held_out = inputs.default_data(3)
    counts = [[rows["family"][:].count(name) for name in ("tools", "docstrings")] for rows in (train, held_out)]
    assert counts == [[1000, 300], [200, 60]]
    assert train.to_list() == inputs.default_data(3)[0].to_list()
    assert not set(train["prompt"][:]) & set(held_out["prompt"][:])
    found = prepare(roomy, embedded, split_seed=3)
    assert (len(found.train), len(found.eval)) == (1300, 260)
    assert set(found.eval["group"]) == {"tools", "docstrings"}
    assert found.report["train"]["lengths"]["p100"] <= 512
    assert found.report["sources"]["train"]["name"] == "the embedded data"


def test_the_embedded_data_are_text(vit: Any, bert: Any, embedded: Any) -> None:
    for config in (vit, bert):
        with pytest.raises(DataError):
            prepare(config, embedded)
    with pytest.raises(DataError, match=r"data.train is not given, and the embedded data are no image-classification"):
        prepare(vit, embedded, task="image-classification")


def test_ids_are_small_and_files_go_with_the_object(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", pairs(4))
    found = prepare(roomy, embedded, train="r.jsonl")
    assert found.train.features["input_ids"].feature.dtype == "int32"
    files = [Path(file["filename"]) for file in found.train.cache_files]
    assert files
    assert all(file.is_relative_to(found.folder.name) for file in files)
    folder = Path(found.folder.name)
    assert folder.is_dir()
    del found
    gc.collect()
    assert not folder.exists()


def test_progress_bars_are_left_as_they_were(write: Write, roomy: Any, embedded: Any, capfd: Any) -> None:
    write("r.jsonl", pairs(4))
    for switch in (datasets.disable_progress_bars, datasets.enable_progress_bars):
        switch()
        before = datasets.are_progress_bars_disabled()
        prepare(roomy, embedded, train="r.jsonl")
        assert datasets.are_progress_bars_disabled() == before
    assert capfd.readouterr().err == ""


def test_the_same_recipe_gives_the_same_rows(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", pairs(30))
    first, second = (prepare(roomy, embedded, train="r.jsonl", packing=True, max_length=40) for _ in range(2))
    assert first.train.to_list() == second.train.to_list()
    assert first.eval.to_list() == second.eval.to_list()
    assert first.report == second.report
