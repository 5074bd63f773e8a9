"""What is special to DyLoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tunesmith
from tests.zoo import batch, logits, tiny
from tunesmith.adapters.dylora import DyLoRA
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.errors import ModelError, TunesmithError


def adapted(**options: object) -> nn.Module:
    """A tiny Llama with DyLoRA of rank 4, moved off its start."""
    model = get_peft_model(tiny("llama"), tunesmith.adapter("dylora", **{"rank": 4, **options}))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for made in layers(model):
            made.B.copy_(0.2 * torch.randn(made.B.shape, generator=g))
    return model.eval()


def layers(model: nn.Module) -> list[DyLoRA]:
    return [m for m in model.modules() if isinstance(m, DyLoRA)]


def by_hand(made: DyLoRA, b: int) -> Tensor:
    return (made.alpha / b * made.B[:, :b] @ made.A[:b]).detach()


@given(rank=st.integers(1, 6), step=st.integers(0, 1000), seed=st.integers(0, 9), frozen=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_step_trains_the_drawn_prefix(rank: int, step: int, seed: int, frozen: bool) -> None:
    layer = nn.Linear(7, 5)
    made = DyLoRA(describe(layer, "layer"), rank=rank, alpha=3.0, frozen=frozen, seed=seed).train()
    with torch.no_grad():
        made.B.copy_(torch.randn(5, rank, generator=torch.Generator().manual_seed(seed)))
    made.begin_step(step)
    b = made.drawn
    assert b is not None
    assert 1 <= b <= rank
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    out = made(x, stacked(layer, made.layer, []))
    assert torch.allclose(out, layer(x) + x @ by_hand(made, b).T, atol=1e-5)
    out.square().sum().backward()
    assert made.A.grad is not None
    assert made.B.grad is not None
    learning = range(b - 1, b) if frozen else range(b)
    assert [i for i in range(rank) if bool(made.A.grad[i].any())] == list(learning)
    assert [i for i in range(rank) if bool(made.B.grad[:, i].any())] == list(learning)


def test_draws_depend_on_the_step_and_the_seed_alone() -> None:
    def draws(steps: list[int], **options: object) -> list[int | None]:
        model, found = adapted(**options), []
        for step in steps:
            with tunesmith.step(model, step):
                drawn = {made.drawn for made in layers(model)}
            assert len(drawn) == 1, "every layer has the same rank"
            found.append(drawn.pop())
        return found

    whole = draws(list(range(40)))
    assert draws(list(range(20, 40))) == whole[20:], "a resumed run draws what the whole one would have drawn"
    assert draws(list(range(40)), seed=1) != whole
    assert set(whole) == {1, 2, 3, 4}


@pytest.mark.parametrize("frozen", [True, False])
def test_merging_and_export_after_training_take_the_deployed_rank(frozen: bool, tmp_path: Path) -> None:
    """A model comes out of training in training mode; the rank drawn last is no property of the adapter."""
    model, given_ = adapted(frozen=frozen), batch("llama")
    expected = logits(model, given_)
    for step in range(3):
        with tunesmith.step(model.train(), step):
            pass
    tunesmith.export_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora")
    assert exported.peft_config["default"].r == 4
    assert torch.allclose(logits(exported, given_), expected, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload(), given_), expected, atol=1e-5)


def test_evaluation_within_a_step_takes_the_deployed_rank() -> None:
    model, given_ = adapted(), batch("llama")
    expected = logits(model, given_)
    with tunesmith.step(model.train(), 1):
        assert layers(model)[0].drawn != 4
        assert torch.equal(logits(model, given_), expected)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_deployed_rank(b: int) -> None:
    base, model, given_ = tiny("llama"), adapted(), batch("llama")
    assert tunesmith.deploy(model, rank=b) == len(layers(model))
    with torch.no_grad():
        for made in layers(model):
            base.get_submodule(made.layer.name).weight += by_hand(made, b)
    expected = logits(base, given_)
    assert torch.allclose(logits(model, given_), expected, atol=1e-5)
    assert torch.allclose(logits(copy.deepcopy(model), given_), expected, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload(), given_), expected, atol=1e-5)


@pytest.mark.parametrize("b", [0, 5, -1])
def test_ranks_outside_of_what_was_trained_are_errors(b: int) -> None:
    model, given_ = adapted(), batch("llama")
    expected = logits(model, given_)
    with pytest.raises(TunesmithError, match=rf"trained for ranks 1 to 4; {b} was asked"):
        tunesmith.deploy(model, rank=b)
    assert torch.equal(logits(model, given_), expected)


def test_saved_at_a_lower_rank_still_holds_all(tmp_path: Path) -> None:
    model, given_ = adapted(), batch("llama")
    expected = logits(model, given_)
    tunesmith.deploy(model, rank=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), given_), expected)


def test_momentum_and_decay_do_not_move_frozen_components() -> None:
    model, given_ = adapted(), batch("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for step in range(12):
        before = [(made.A.detach().clone(), made.B.detach().clone()) for made in layers(model)]
        with tunesmith.step(model.train(), step):
            b = layers(model)[0].drawn
            model(**given_).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        assert b is not None
        others = [i for i in range(4) if i != b - 1]
        for made, (A, B) in zip(layers(model), before, strict=True):
            assert torch.equal(made.A[others], A[others])
            assert torch.equal(made.B[:, others], B[:, others])
            assert not torch.equal(made.A[b - 1], A[b - 1])


def test_without_freezing_all_of_the_prefix_moves() -> None:
    model, given_ = adapted(frozen=False), batch("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(6):
        before = [made.A.detach().clone() for made in layers(model)]
        with tunesmith.step(model.train(), step):
            b = layers(model)[0].drawn
            model(**given_).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        for made, A in zip(layers(model), before, strict=True):
            assert (made.A != A).any(1).tolist() == [i < (b or 0) for i in range(4)]


def test_micro_batches_of_a_step_share_the_rank() -> None:
    model, given_ = adapted(frozen=False), batch("llama", rows=4)
    halves = [{name: tensor[i : i + 2] for name, tensor in given_.items()} for i in (0, 2)]
    grads = []
    for parts in ([given_], halves):
        with tunesmith.step(model.train(), 5):
            for part in parts:
                (model(**part).loss / len(parts)).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for whole, summed in zip(*grads, strict=True):
        assert torch.allclose(whole, summed, atol=1e-6)


def test_training_without_steps_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"tunesmith\.callbacks"):
        adapted().train()(**batch("llama"))


def test_in_a_trainer(tmp_path: Path) -> None:
    model, given_ = adapted(), batch("llama")
    start = logits(model, given_)
    rows = Dataset.from_list(
        [{"input_ids": ids, "labels": ids} for ids in batch("llama", rows=8)["input_ids"].tolist()]
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=args, train_dataset=rows, callbacks=tunesmith.callbacks(model)).train()
    assert all(made.drawn is None for made in layers(model))
    trained = logits(model, given_)
    assert not torch.allclose(trained, start, atol=1e-3)
    assert torch.allclose(logits(model.merge_and_unload(), given_), trained, atol=1e-5)
