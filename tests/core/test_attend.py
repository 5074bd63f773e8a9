"""Attention with plugs: without them nothing changes, with them every family does as by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import FAMILIES, batch, logits, tiny
from tunesmith.core.attend import NAME, enable, plug
from tunesmith.errors import ModelError

ATTENTION = {
    "llama": "model.layers.0.self_attn",
    "qwen2": "model.layers.0.self_attn",
    "gpt2": "transformer.h.0.attn",
    "opt": "model.decoder.layers.0.self_attn",
    "bert": "bert.encoder.layer.0.attention.self",
    "t5": "encoder.block.0.layer.0.SelfAttention",
    "vit": "vit.layers.0.attention",
}
ON = pytest.mark.parametrize("family", FAMILIES)


class Looking:
    looks = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def before(self, query: Tensor, key: Tensor) -> None:
        return None

    def look(self, probabilities: Tensor) -> None:
        self.seen.append(probabilities.detach())


class Before:
    """One key without length before the own ones: every query gives it its share."""

    looks = False

    def before(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, key.shape[1], 1, key.shape[3])
        return torch.zeros(shape), torch.full(shape, 3.0)

    def look(self, probabilities: Tensor) -> None:
        raise AssertionError


def padded(family: str) -> dict[str, Tensor]:
    given = batch(family)
    if "attention_mask" in given:
        given["attention_mask"][1, 6:] = 0
    return given


@ON
def test_without_plugs_nothing_changes(family: str) -> None:
    model, given = tiny(family), padded(family)
    expected = logits(model, given)
    assert enable(model) in ("sdpa", "eager")
    assert torch.allclose(logits(model, given), expected, atol=1e-5)


@ON
def test_a_look_sees_the_probabilities_of_the_eager_function(family: str) -> None:
    model, given = tiny(family), padded(family)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    out = eager(**given, output_attentions=True)
    expected = (out.encoder_attentions if family == "t5" else out.attentions)[0]
    enable(model)
    made = Looking()
    handle = plug(model.get_submodule(ATTENTION[family]), made)
    found = logits(model, given)
    rows = torch.ones_like(expected, dtype=torch.bool)
    if "attention_mask" in given:  # what padding sees means nothing
        rows = given["attention_mask"].bool()[:, None, :, None].expand_as(expected)
    assert torch.allclose(made.seen[0][rows], expected[rows], atol=1e-5)
    assert torch.allclose(found, logits(eager, given), atol=1e-4)
    handle.remove()
    logits(model, given)
    assert len(made.seen) == 1


@ON
def test_keys_before_the_own_ones_are_seen_by_every_query(family: str) -> None:
    model, given = tiny(family), padded(family)
    expected = logits(model, given)
    enable(model)
    attention = model.get_submodule(ATTENTION[family])
    handle = plug(attention, Before())
    changed = logits(model, given)
    assert (changed - expected).abs().max() > 1e-2 * expected.std()
    looking = Looking()
    second = plug(attention, looking)
    assert torch.allclose(logits(model, given), changed, atol=1e-4), "looking changes nothing"
    assert (looking.seen[0].sum(-1) < 1).any(), "the added key has taken its share"
    handle.remove()
    second.remove()
    assert torch.allclose(logits(model, given), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_generation_without(family: str) -> None:
    model, given = tiny(family), padded(family)
    enable(model)
    plug(model.get_submodule(ATTENTION[family]), Before())
    ids, mask = given["input_ids"].flip(1), given["attention_mask"].flip(1)
    made = [
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, use_cache=cache, do_sample=False)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_attention_that_cannot_be_plugged_is_named() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"'flash_attention_2'.*attn_implementation='sdpa'"):
        enable(model)
    with pytest.raises(ModelError, match="Linear does not take"):
        enable(nn.Linear(2, 2))
    assert NAME not in str(model.config._attn_implementation)
