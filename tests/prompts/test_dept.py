"""What is special to DePT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.core.prompt import PromptContext, PromptSpace
from tunesmith.errors import ModelError, RecipeError
from tunesmith.prompts.dept import DePT, restart_offset


def made(dim: int = 16, **options: Any) -> DePT:
    torch.manual_seed(0)
    return DePT(PromptSpace(nn.Embedding(11, dim)), **options)


def context(mask: torch.Tensor, dim: int = 16) -> PromptContext:
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return PromptContext(torch.zeros(*mask.shape, dim), mask.bool(), positions, None)


@given(m=st.integers(0, 9), r=st.integers(0, 5), s=st.integers(1, 20), d=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_count_is_m_d_plus_r_times_s_plus_d(m: int, r: int, s: int, d: int) -> None:
    part = made(d, num_virtual_tokens=m, rank=r, max_length=s)
    assert part.trainable_count() == m * d + r * (s + d)
    assert part.length == m


@given(pads=st.lists(st.integers(0, 6), min_size=1, max_size=4), left=st.booleans())
@settings(max_examples=30, deadline=None)
def test_rows_of_the_offset_follow_the_token_not_the_column(pads: list[int], left: bool) -> None:
    part = made(num_virtual_tokens=2, rank=3, max_length=8)
    nn.init.normal_(part.B)
    width = 7
    mask = torch.ones(len(pads), width, dtype=torch.long)
    for i, pad in enumerate(pads):
        mask[i, : pad if left else 0] = 0
        mask[i, width if left else width - pad :] = 0
    added = part(context(mask)).add
    rows = 8 / 3**0.5 * (part.A @ part.B)
    for i in range(len(pads)):
        real = added[i][mask[i].bool()]
        assert torch.allclose(real, rows[: len(real)], atol=1e-6)


def test_rank_zero_is_plain_prompt_tuning() -> None:
    base, inputs = tiny("llama"), batch("llama")
    torch.manual_seed(5)
    plain = get_peft_model(copy.deepcopy(base), tunesmith.adapter("dept", num_virtual_tokens=4, rank=0)).eval()
    torch.manual_seed(5)
    dept = get_peft_model(copy.deepcopy(base), tunesmith.adapter("dept", num_virtual_tokens=4, rank=3)).eval()
    assert torch.equal(logits(plain, inputs), logits(dept, inputs))
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == [
        "base_model.model.model.embed_tokens.tunesmith_prompts.default.0.P"
    ]


def test_starts_from_words_repeated_or_cut() -> None:
    space = PromptSpace(nn.Embedding(11, 4))
    rows = space.embedding.weight.detach()
    assert torch.equal(DePT(space, num_virtual_tokens=5, init_ids=[3, 4]).P, rows[[3, 4, 3, 4, 3]])
    assert torch.equal(DePT(space, num_virtual_tokens=1, init_ids=[3, 4]).P, rows[[3]])


def test_an_input_longer_than_the_offset_is_a_clear_error() -> None:
    base = tiny("llama")
    model = get_peft_model(base, tunesmith.adapter("dept", num_virtual_tokens=2, max_length=5)).eval()
    model.generation_config.eos_token_id = None
    padded = {"input_ids": torch.full((1, 9), 5), "attention_mask": torch.tensor([[0] * 4 + [1] * 5])}
    assert logits(model, padded).shape == (1, 9, 64), "padding does not count"
    with pytest.raises(ModelError, match="6 tokens, but the offset was made for max_length=5"):
        logits(model, {"input_ids": torch.full((1, 6), 5)})
    with pytest.raises(ModelError, match="6 tokens"):
        model.generate(input_ids=torch.full((1, 4), 5), max_new_tokens=5, do_sample=False, pad_token_id=0)


def test_rates_are_those_of_the_offset() -> None:
    assert made(lr_ratio=0.25).lr_ratios() == {"A": 0.25, "B": 0.25}
    assert made(rank=0).lr_ratios() == {}


def test_a_new_task_begins_without_the_offset() -> None:
    model = get_peft_model(tiny("llama"), tunesmith.adapter("dept", num_virtual_tokens=2)).eval()
    part = next(m for m in model.modules() if isinstance(m, DePT))
    nn.init.normal_(part.B)
    before = part.A.detach().clone(), part.P.detach().clone()
    assert restart_offset(model) == 1
    assert not part.offset().any()
    assert torch.equal(part.A, before[0])
    assert torch.equal(part.P, before[1])


@pytest.mark.parametrize("option", [{"rank": -1}, {"max_length": 0}, {"alpha": 0.0}, {"num_virtual_tokens": -2}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(option))):
        tunesmith.adapter("dept", **option)
