"""Segmented SFT: heads of every kind, what never exists at once, and what it cannot do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.zoo import DECODERS, VOCABULARY, tiny
from tunesmith.core import segmented
from tunesmith.errors import ModelError
from tunesmith.objectives.segmented_sft import SegmentedSFT
from tunesmith.objectives.sft import SFT


def given(labelled: int = 9) -> dict[str, Tensor]:
    """Two rows of 14 tokens; the second has one label less, in the middle."""
    ids = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(14) < 14 - labelled, -100)
    labels[1, 10] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def both(model: nn.Module, segment: int, **context: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of `sft` and of this objective."""
    found = []
    for objective in (SFT(), SegmentedSFT(segment=segment)):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", **context) if context else torch.enable_grad():
            loss, _ = objective(model, given())
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return found


def same(found: list[tuple[Tensor, dict[str, Tensor]]], tolerance: float) -> bool:
    (a, wanted), (b, mine) = found
    near = all(
        torch.allclose(mine[n], g, atol=tolerance * float(g.abs().max().clamp_min(1e-2))) for n, g in wanted.items()
    )
    return wanted.keys() == mine.keys() and near and torch.allclose(a, b, rtol=max(tolerance, 1e-6))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("segment", [1, 4, 100])
def test_any_segment_gives_the_loss_and_gradients_of_sft(family: str, segment: int) -> None:
    model = tiny(family, initializer_range=0.3) if family != "opt" else tiny(family, init_std=0.3)
    assert same(both(model, segment), 1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    found = both(model, 4)
    assert same(found, 1e-5)
    assert "lm_head.weight" not in found[1][1]


def test_half_precision_loses_nothing_against_sft() -> None:
    """torch's function would round each loss to bfloat16, 0.4 percent."""
    found = both(tiny("qwen2", initializer_range=0.3).to(torch.bfloat16), 4)
    assert found[1][0].dtype == torch.float32
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert same(found, 1e-2)
    assert same(both(tiny("llama", initializer_range=0.3), 4, dtype=torch.bfloat16), 2e-2)


def test_a_head_with_an_adapter() -> None:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    assert same(both(get_peft_model(tiny("llama"), config), 4), 1e-5)


def test_what_runs_again_draws_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(tiny("llama"), config).train()
    once = both(model, 4)[1]
    monkeypatch.setattr(segmented, "checkpoint", lambda run, *args, use_reentrant: run(*args))
    assert same([both(model, 4)[1], once], 1e-6)


class Kept(TorchDispatchMode):
    """The most rows that a tensor over the vocabulary has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == 97 and x.shape[-2] not in (32, 2):
                self.most = max(self.most, x.shape[:-1].numel())
        return out


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_exist_for_one_segment_at_a_time(adapted: bool) -> None:
    model: nn.Module = tiny("llama", vocab_size=97)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with Kept() as kept:
        loss, _ = SegmentedSFT(segment=3)(model, given())
        loss.backward()
    assert kept.most == 3
    with Kept() as kept:
        SFT()(model, given())[0].backward()
    assert kept.most >= 17


def test_the_head_is_put_back_whatever_happens() -> None:
    model = tiny("gpt2")
    SegmentedSFT()(model, given())
    assert "forward" not in model.lm_head.__dict__
    mine = model.lm_head.forward
    model.lm_head.forward = lambda x: mine(x)
    other = model.lm_head.forward
    with pytest.raises(IndexError):
        SegmentedSFT()(model, {**given(), "input_ids": torch.full((2, 14), 10**6)})
    assert model.lm_head.forward is other
    assert same(both(model, 4), 1e-5), "a replaced forward is called, not gone around"


def test_what_changes_logits_after_the_head_is_refused() -> None:
    config = T.GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    with pytest.raises(ModelError, match=r"Granite.* changes its logits after the output head"):
        SegmentedSFT()(T.GraniteForCausalLM(config), given())


class Whole(nn.Module):
    """Logits without a head; maybe with one that it does not use."""

    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, VOCABULARY), head

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table(input_ids)[:, logits_to_keep])


def test_a_model_without_a_head_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        segmented.logging, "get_logger", lambda _: SimpleNamespace(warning_once=lambda text: said.append(text))
    )
    model = Whole(None)
    assert torch.equal(SegmentedSFT()(model, given())[0], SFT()(model, given())[0])
    assert "all at once" in said[0]
    with pytest.raises(ModelError, match="without its output head"):
        SegmentedSFT()(Whole(nn.Linear(4, VOCABULARY)), given())


def test_a_model_that_does_not_know_which_logits_to_keep() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=self.head(self.embed(input_ids)))

    assert same(both(Old(), 4), 1e-5)


def test_losses_are_in_reading_order() -> None:
    model, batch = tiny("llama"), given()
    found = segmented.segmented_losses(model, batch, 4)
    logits = model(**{**batch, "labels": None}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    assert torch.allclose(found, F.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none"))
