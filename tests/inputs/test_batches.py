"""Batches: padding hides nothing real, rows end to end, and packing that loses and repeats nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.inputs.conftest import byte_level, pairs, prepare
from tests.zoo import tiny
from tunesmith.core.loss import count_labels
from tunesmith.core.packing import Flatten
from tunesmith.errors import DataError
from tunesmith.inputs.batches import Pad, pack

Write = Callable[..., str]


def test_padding_is_on_the_right_and_masked() -> None:
    rows = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2], "group": "a", "prompt_length": 1}]
    rows += [{"input_ids": [7, 2], "labels": [7, 2], "group": None, "prompt_length": 0}]
    batch = Pad(2)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_targets_of_another_length_and_classes() -> None:
    batch = Pad(0)([{"input_ids": [5], "labels": [1, 2, 3]}, {"input_ids": [5, 6], "labels": [1]}])
    assert batch["labels"].tolist() == [[1, 2, 3], [1, -100, -100]]
    assert Pad(0)([{"input_ids": [5], "labels": 1}, {"input_ids": [5, 6], "labels": 0}])["labels"].tolist() == [1, 0]


def test_a_tokenizer_without_a_padding_token(write: Write, roomy: Any) -> None:
    tokenizer = byte_level()
    write("r.jsonl", [*pairs(3), {"prompt": "a", "completion": " much longer answer than the others"}])
    write("e.jsonl", pairs(2))
    found = prepare(roomy, tokenizer, train="r.jsonl", eval="e.jsonl")
    assert tokenizer.pad_token_id is None, "the user's tokenizer is left as it is"
    assert found.pad_token == tokenizer.eos_token_id
    assert found.report["notes"] == [
        "the tokenizer has no padding token: the end-of-sequence token pads, behind the mask"
    ]
    batch = found.collator([found.train[at] for at in range(4)])
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1, 1]
    assert batch["attention_mask"].sum().item() == found.report["train"]["tokens"]
    assert count_labels(batch).item() == found.report["train"]["labelled_tokens"]


def test_padded_and_flattened_batches_hold_the_same_labels(write: Write, roomy: Any, embedded: Any) -> None:
    write("r.jsonl", pairs(9))
    padded = prepare(roomy, embedded, train="r.jsonl")
    flat = prepare(roomy, embedded, train="r.jsonl", padding_free=True)
    packed = prepare(roomy, embedded, train="r.jsonl", packing=True, max_length=32)
    assert isinstance(flat.collator, Flatten)
    assert isinstance(packed.collator, Flatten)
    counts = []
    for found in (padded, flat, packed):
        batch = found.collator([found.train[at] for at in range(len(found.train))])
        counts.append(count_labels(batch).item())
        if found is not padded:
            assert batch["cu_seq_lens_q"][-1] == batch["input_ids"].numel() == found.report["train"]["tokens"]
            assert len(batch["cu_seq_lens_q"]) == 9
    assert counts == [padded.report["train"]["labelled_tokens"]] * 3
    assert "lengths" not in packed.eval.column_names


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths)
def test_packing_loses_and_repeats_nothing(tmp_path: Path, sizes: list[int]) -> None:
    ids = [[row * 100 + at for at in range(size)] for row, size in enumerate(sizes)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids], "group": ["a"] * len(ids)})
    packed, report = pack(rows, 12, tmp_path)
    assert packed.column_names == ["input_ids", "labels", "lengths"]
    apart = []
    for row in packed:
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 12
        start = 0
        for length in row["lengths"]:
            apart.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(apart) == sorted((row, [-100, *row[1:]]) for row in ids)
    assert report == {
        "rows_before": len(sizes),
        "rows": len(packed),
        "length": 12,
        "utilisation": round(sum(sizes) / (12 * len(packed)), 4),
    }
    assert pack(rows, 12, tmp_path)[0].to_list() == packed.to_list()


def test_packing_fills_rows(tmp_path: Path) -> None:
    ids = [[1] * size for size in (7, 5, 6, 6, 9, 3)]
    packed, report = pack(Dataset.from_dict({"input_ids": ids, "labels": ids}), 12, tmp_path)
    assert (len(packed), report["utilisation"]) == (3, 1.0)


@pytest.mark.parametrize("fields", [{"packing": True}, {"padding_free": True}])
def test_only_causal_models_take_rows_end_to_end(write: Write, t5: Any, embedded: Any, fields: dict[str, Any]) -> None:
    write("r.jsonl", pairs(4))
    name = next(iter(fields))
    with pytest.raises(DataError, match=f"data.{name} is for causal language models; the task is seq2seq"):
        prepare(t5, embedded, train="r.jsonl", **fields)


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_learns_from_the_batches(write: Write, embedded: Any, packing: bool) -> None:
    from tunesmith.core.packing import enable

    model = tiny("llama", vocab_size=len(embedded), max_position_embeddings=256)
    model.config.architectures = ["LlamaForCausalLM"]
    write("r.jsonl", pairs(6))
    found = prepare(model.config, embedded, train="r.jsonl", packing=packing)
    if packing:
        enable(model)
    assert model(**found.collator([found.train[at] for at in range(len(found.train))])).loss.isfinite()
