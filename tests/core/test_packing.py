"""Rows laid end to end do not see each other, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import DECODERS, VOCABULARY, batch, logits, tiny
from tunesmith.core import packing
from tunesmith.core.loss import count_labels, labelled, targets_of
from tunesmith.core.packing import Flatten, enable, segments
from tunesmith.errors import ModelError

LENGTHS = (6, 1, 9, 3)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def wide(name: str) -> nn.Module:
    if name in DECODERS:
        return tiny(name, initializer_range=0.3)
    torch.manual_seed(0)
    if name == "mistral":
        return T.MistralForCausalLM(T.MistralConfig(**SMALL, sliding_window=4)).eval()
    if name == "gemma2":
        return T.Gemma2ForCausalLM(T.Gemma2Config(**SMALL, sliding_window=4)).eval()
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**SMALL, sliding_window=4)).eval()


def inputs(flat: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name != "labels"}


@pytest.mark.parametrize("name", [*DECODERS, "mistral", "gemma3"])
def test_rows_are_as_alone(name: str) -> None:
    model = wide(name)
    alone = [logits(model, {"input_ids": torch.tensor([row["input_ids"]])})[0] for row in rows()]
    enable(model)
    together = logits(model, inputs(Flatten()(rows())))[0]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("name", [*DECODERS, "mistral", "gemma3"])
def test_ordinary_batches_and_generation_go_on_as_before(name: str) -> None:
    model, given = wide(name), batch("llama")
    given["attention_mask"][0, :3] = 0
    settings_ = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before, text = logits(model, given), model.generate(given["input_ids"], **settings_)
    enable(model)
    logits(model, inputs(Flatten()(rows())))
    assert torch.allclose(logits(model, given), before, atol=1e-5)
    assert torch.equal(model.generate(given["input_ids"], **settings_), text)


def test_no_mask_is_built_for_rows_laid_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama")
    enable(model)
    built = []
    monkeypatch.setattr(packing, "sdpa_mask", lambda *args, **kwargs: built.append(args))
    logits(model, inputs(Flatten()(rows())))
    assert not built


def test_the_inner_model_masks_padding_after_a_flattened_batch() -> None:
    model = wide("llama")
    given = padded("left")
    expected = model.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    enable(model)
    logits(model, inputs(Flatten()(rows())))
    found = model.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    real = given["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_rows(name: str) -> None:
    model = wide(name).train()
    enable(model)
    flat = Flatten()(rows())
    labelled(model, flat).logits.square().sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row in rows():
        one = {key: torch.tensor([value]) for key, value in row.items()}
        labelled(model, one).logits.square().sum().backward()
    scale = max(float(g.abs().max()) for g in together.values())
    assert all(torch.allclose(p.grad, together[n], atol=1e-5 * scale) for n, p in model.named_parameters())


def test_a_model_that_cannot_is_refused_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    encoder = T.BertForMaskedLM(T.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})).eval()
    given = {"input_ids": batch("bert")["input_ids"]}
    before, implementation = logits(encoder, given), encoder.config._attn_implementation
    with pytest.raises(ModelError, match="BertForMaskedLM cannot keep rows apart"):
        enable(encoder)
    assert encoder.config._attn_implementation == implementation
    assert not encoder._forward_hooks
    assert torch.equal(logits(encoder, given), before)


def test_attention_that_would_change_is_refused() -> None:
    """Gemma 2 caps its attention scores, which scaled dot-product attention cannot."""
    model = wide("gemma2")
    given = {"input_ids": batch("llama")["input_ids"]}
    before = logits(model, given)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM cannot keep rows apart"):
        enable(model)
    assert torch.equal(logits(model, given), before)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_flattened_bounds_positions_and_segments(lengths: list[int]) -> None:
    flat = Flatten()(rows(tuple(lengths)))
    assert flat["cu_seq_lens_q"].tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert flat["position_ids"][0].tolist() == [t for n in lengths for t in range(n)]
    assert segments(flat)[0].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert int(count_labels(flat)) == sum(n - 1 for n in lengths)


def test_a_packed_row_is_several() -> None:
    some = rows((3, 4))
    packed = {key: some[0][key] + some[1][key] for key in ("input_ids", "labels")}
    one = Flatten()([{**packed, "lengths": [3, 4]}, *rows((2,))])
    apart = Flatten()([*some, *rows((2,))])
    assert all(torch.equal(one[k], apart[k]) for k in ("input_ids", "labels", "cu_seq_lens_q", "position_ids"))


def padded(side: str) -> dict[str, Tensor]:
    width = 12
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows():
        n = len(row["input_ids"])
        for key, value, empty in (
            ("input_ids", row["input_ids"], 0),
            ("attention_mask", [1] * n, 0),
            ("labels", row["labels"], 7),  # also padding is labelled, as when ids are copied
        ):
            rest = [empty] * (width - n)
            made[key].append(rest + value if side == "left" else value + rest)
    return {key: torch.tensor(value) for key, value in made.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_a_first_token_has_a_label(side: str) -> None:
    given, flat = padded(side), Flatten()(rows())
    flat["labels"] = flat["input_ids"].clone()
    assert int(count_labels(given)) == int(count_labels(flat)) == sum(n - 1 for n in LENGTHS)
    assert targets_of(given)[targets_of(given) >= 0].tolist() == targets_of(flat)[targets_of(flat) >= 0].tolist()
    assert segments(given).unique().tolist() == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("rows_", [1, 3])
def test_labelled_keeps_what_a_label_is_predicted_from(rows_: int) -> None:
    model = wide("llama")
    given = {key: value[:rows_] for key, value in padded("right").items()}
    found = labelled(model, given)
    every = logits(model, {key: given[key] for key in ("input_ids", "attention_mask")})
    row, column = found.index.T
    assert torch.allclose(found.logits, every[row, column - 1], atol=1e-5)
    assert torch.equal(found.labels, given["labels"][row, column])
    assert torch.equal(found.segment, row)
