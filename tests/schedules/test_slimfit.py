"""What is special to SlimFit."""

from __future__ import annotations

import copy
from math import ceil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.zoo import batch, tiny
from tunesmith import catalog
from tunesmith.core.meters import saved_bytes
from tunesmith.errors import CheckpointError, RecipeError, TunesmithError
from tunesmith.schedules.slimfit import SlimFit


def attached(model: nn.Module, lr: float = 1e-2, **options: Any) -> SlimFit:
    schedule = SlimFit(**options)
    trained = [p for p in model.parameters() if p.requires_grad]
    schedule.attach(model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0))
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def take(schedule: SlimFit, step: int, inputs: dict[str, Tensor]) -> None:
    assert schedule.model is not None
    assert schedule.optimizer is not None
    schedule.begin_step(step)
    schedule.model(**inputs).loss.backward()
    schedule.optimizer.step()
    schedule.optimizer.zero_grad()


class Toy(nn.Module):
    """n matrices, applied one after the other."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))


# Candidates ---------------------------------------------------------------------------------------------------------


def test_matrices_and_norms_take_turns_and_the_rest_trains_always() -> None:
    model = tiny("vit")
    schedule = attached(model)
    embeddings = ["cls_token", "position_embeddings", "patch_embeddings.projection.weight"]
    assert schedule.candidates[:3] == [f"vit.embeddings.{name}" for name in embeddings]
    assert len(schedule.candidates) == 3 + 2 * (6 + 2) + 1
    assert {n.rpartition(".")[2] for n in set(schedule.eligible) - set(schedule.candidates)} == {"weight", "bias"}
    always = schedule.active(0) - set(schedule.candidates)
    assert "classifier.weight" in always
    assert all(name.endswith("bias") for name in always - {"classifier.weight"})


def test_a_new_head_takes_turns_if_asked_and_a_language_models_always() -> None:
    assert "classifier.weight" in attached(tiny("vit"), classifier=True).candidates
    assert "classifier.weight" not in attached(tiny("bert")).candidates
    llama = attached(tiny("llama")).candidates
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < set(llama)
    assert "model.layers.0.input_layernorm.weight" in llama


def test_adapters_take_turns() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny("bert"), config)
    schedule = attached(model, frozen=0.5)
    assert len(schedule.candidates) == 8
    assert all("lora_" in name for name in schedule.candidates)
    schedule.begin_step(0)
    assert len([n for n in training(model) if "lora_" in n]) == 4
    assert any("classifier.modules_to_save" in n for n in training(model))


def test_nothing_that_takes_turns_is_a_clear_error() -> None:
    model = tiny("bert")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or "classifier" in name)
    with pytest.raises(TunesmithError, match="BertForSequenceClassification that train are biases"):
        attached(model)
    assert len(attached(model, classifier=True).candidates) == 1


@pytest.mark.parametrize(
    "options",
    [{"frozen": 1.0}, {"frozen": -0.1}, {"gelu_bits": 3}, {"kept": 0}, {"kept": 1.1}, {"eps": 0}, {"scaling": "x"}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        catalog.get("slimfit").validate(options)


# What trains --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 40), share=st.sampled_from([0, 0.29, 0.5, 0.75, 0.9, 0.95, 0.99]), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_the_share_that_rests_is_exact_and_a_sweep_visits_all(n: int, share: float, seed: int) -> None:
    schedule = attached(Toy(n), frozen=share, seed=seed, compress=False)
    train = n - int(share * 100 + 1e-6) * n // 100
    seen: list[int] = []
    for step in range(ceil(n / train)):
        chosen = schedule.chosen(step)
        assert len(chosen) == train
        seen += chosen
        schedule.active(step)
        schedule._remember()
        with torch.no_grad():
            for i in chosen:
                schedule.eligible[schedule.candidates[i]].mul_(1e9)
        schedule._score()
        assert schedule.visits.sum() == train * (step + 1)
    assert set(seen) == set(range(n)), "also where scores are above those of the start"


def test_a_share_that_a_float_misses() -> None:
    schedule = SlimFit(frozen=0.29)
    schedule.candidates = ["w"] * 100
    assert schedule.training == 71, "0.29 * 100 is a little below 29"


def test_the_first_order_is_by_the_random_scores() -> None:
    schedule = attached(Toy(12), frozen=0.75)
    ranked = schedule.scores.argsort(descending=True).tolist()
    assert [schedule.chosen(step) for step in range(4)] == [sorted(ranked[3 * i : 3 * i + 3]) for i in range(4)]
    assert attached(Toy(12), frozen=0.75, seed=1).chosen(0) != schedule.chosen(0)


def test_afterwards_those_train_that_moved_most() -> None:
    schedule = attached(Toy(8), frozen=0.75)
    schedule.visits += 1
    schedule.scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0, 0.0, 4.0, 1.0], dtype=torch.float64)
    assert schedule.chosen(4) == [1, 4]
    schedule.visits[5] = 0
    assert schedule.chosen(4) == [4, 5], "what has never trained goes first"


def test_a_score_is_the_mean_relative_change_of_what_has_trained() -> None:
    model, inputs = tiny("bert").train(), batch("bert")
    schedule = attached(model, frozen=0.5, eps=1e-3)
    for step in range(6):
        before = {name: schedule.eligible[name].detach().clone() for name in schedule.candidates}
        scores, visits = schedule.scores.tolist(), schedule.visits.tolist()
        take(schedule, step, inputs)
        for i, (name, old) in enumerate(before.items()):
            if i not in schedule._now:
                assert (schedule.scores[i], schedule.visits[i]) == (scores[i], visits[i])
                continue
            moved = (schedule.eligible[name].detach().double() - old.double()).abs() / (old.double().abs() + 1e-3)
            assert float(schedule.scores[i]) == pytest.approx(float(moved.mean()), rel=1e-4)
            assert schedule.visits[i] == visits[i] + 1


def test_zero_weights_give_a_finite_score() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"])
    schedule = attached(peft.get_peft_model(tiny("bert"), config), frozen=0.0)
    take(schedule, 0, batch("bert"))
    assert bool(schedule.scores.isfinite().all())
    take(schedule, 1, batch("bert"))
    assert float(schedule.scores.max()) < 100, "matrices that were zero do not stay in front"


def test_a_step_that_is_not_taken_leaves_no_score() -> None:
    """As when a gradient scaler skips one."""
    schedule = attached(Toy(8), frozen=0.75)
    first = schedule.chosen(0)
    scores = schedule.scores.clone()
    for step in range(4):
        schedule.begin_step(step)
        if step:
            assert schedule.optimizer is not None
            schedule.optimizer.step()
    assert torch.equal(schedule.scores[first], scores[first])
    assert schedule.chosen(4) == first, "made up for"


def test_a_tensor_without_gradients_does_not_block_the_others() -> None:
    model = Toy(4)
    schedule = attached(model, frozen=0.5)
    seen: list[int] = []
    for step in range(6):
        schedule.begin_step(step)
        seen += schedule._now
        used = model.layers[0](torch.ones(1, 2)) + model.layers[1](torch.ones(1, 2))
        used.sum().backward()
        assert schedule.optimizer is not None
        schedule.optimizer.step()
        schedule.optimizer.zero_grad()
    assert seen[4:].count(0) == seen[4:].count(1) == 4
    assert set(seen[:4]) == {0, 1, 2, 3}


def test_copies_are_of_what_trains_and_only_while_the_optimizer_steps() -> None:
    model, inputs = tiny("vit").train(), batch("vit")
    schedule = attached(model)
    held: list[dict[int, Tensor]] = []
    assert schedule.optimizer is not None
    schedule.optimizer.register_step_pre_hook(lambda *_: held.append(dict(schedule._before)))
    for step in range(4):
        take(schedule, step, inputs)
        assert not schedule._before
        assert set(held[-1]) == set(schedule._now)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in held[-1].values())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_micro_batches_share_a_choice(family: str) -> None:
    model = tiny(family).train()
    schedule = attached(model, frozen=0.5)
    for step in range(3):
        schedule.begin_step(step)
        for seed in (0, 1):
            model(**batch(family, seed=seed)).loss.backward()
        grads = {n for n, p in model.named_parameters() if p.grad is not None}
        assert grads == training(model)
        assert schedule.optimizer is not None
        schedule.optimizer.step()
        schedule.optimizer.zero_grad()
    assert int(schedule.visits.sum()) == 3 * schedule.training


def test_half_precision() -> None:
    model = tiny("llama").to(torch.bfloat16).train()
    schedule = attached(model)
    for step in range(12):
        take(schedule, step, batch("llama"))
    assert schedule.scores.dtype == torch.float64
    assert bool((schedule.visits > 0).all())
    assert bool((schedule.scores < 1e5).all())


# Memory, state and leaving --------------------------------------------------------------------------------------------


def test_less_is_kept_when_more_rests_and_when_it_is_compressed() -> None:
    sizes = {}
    for share in (0.0, 0.9):
        for compress in (False, True):
            model = tiny("vit").train()
            schedule = attached(model, frozen=share, compress=compress)
            schedule.begin_step(0)
            with saved_bytes(model) as saved:
                logits = model(**batch("vit", rows=8)).logits
            schedule.detach()
            assert torch.equal(logits, model(**batch("vit", rows=8)).logits)
            sizes[share, compress] = saved.bytes
    assert sizes[0.9, False] < sizes[0.0, False]
    assert sizes[0.9, True] < 0.75 * sizes[0.0, True]
    assert sizes[0.9, True] < 0.45 * sizes[0.0, False]


def test_options_reach_the_formats() -> None:
    schedule = SlimFit(gelu_bits=8, operand_bits=4, softmax_bits=4, scaling="rows", linear="wide", kept=0.5)
    found = schedule.settings
    assert (found.activation.bits, found.activation.scale, found.activation.rows) == (8, 32, False)
    assert (found.operand.bits, found.operand.scale, found.operand.rows) == (4, 1, True)
    assert (found.probability.bits, found.probability.scale, found.probability.rows) == (4, 16, True)
    assert (found.linear, found.kept) == ("wide", 0.5)
    default = SlimFit().settings
    assert [f.scale for f in (default.activation, default.operand, default.probability)] == [2, 16, 256]


def test_leaving_takes_everything_off() -> None:
    model, inputs = tiny("llama").train(), batch("llama")
    classes = [type(m) for m in model.modules()]
    schedule = attached(model)
    take(schedule, 0, inputs)
    optimizer = schedule.optimizer
    assert optimizer is not None
    scores = schedule.scores.clone()
    assert [type(m) for m in model.modules()] != classes
    schedule.detach()
    assert [type(m) for m in model.modules()] == classes
    model(**inputs).loss.backward()
    optimizer.step()
    assert torch.equal(schedule.scores, scores)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_another_model_frees_the_first() -> None:
    first, second = tiny("llama"), tiny("bert")
    classes = [type(m) for m in first.modules()]
    schedule = attached(first)
    schedule.attach(second, torch.optim.AdamW(second.parameters()))
    assert [type(m) for m in first.modules()] == classes


@pytest.mark.parametrize("keep", [True, False])
def test_optimizer_state_of_what_rests(keep: bool) -> None:
    model, inputs = tiny("vit").train(), batch("vit")
    schedule = attached(model, keep_state=keep)
    for step in range(8):
        take(schedule, step, inputs)
    assert schedule.optimizer is not None
    held = {n for n in schedule.candidates if schedule.eligible[n] in schedule.optimizer.state}
    assert len(held) == (int((schedule.visits > 0).sum()) if keep else schedule.training)


def test_going_on_from_a_state_gives_the_same_bits() -> None:
    model, inputs = tiny("bert").train(), batch("bert")
    schedule = attached(model, frozen=0.75)
    for step in range(9):
        take(schedule, step, inputs)
    saved = copy.deepcopy((model.state_dict(), schedule.optimizer.state_dict(), schedule.training_state()))
    for step in range(9, 15):
        take(schedule, step, inputs)
    other = tiny("bert", seed=1).train()
    resumed = SlimFit(frozen=0.75)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.restore(saved[2])
    resumed.attach(other, optimizer)
    for step in range(9, 15):
        take(resumed, step, inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(resumed.scores, schedule.scores)
    assert torch.equal(resumed.visits, schedule.visits)


def test_the_scores_of_another_run_are_refused() -> None:
    state = attached(tiny("bert"), classifier=True).training_state()
    with pytest.raises(CheckpointError, match="scores of 22 tensors, but 21 take turns here"):
        attached(tiny("bert"), classifier=False).load_training_state(state)


def test_what_was_saved_does_not_move_with_the_run() -> None:
    schedule = attached(tiny("vit").train())
    saved = schedule.training_state()
    take(schedule, 0, batch("vit"))
    assert not saved["visits"].any()
    assert not torch.equal(saved["scores"], schedule.scores)
    rows = schedule.movement()
    assert [row["parameter"] for row in rows] == schedule.candidates
    assert [row["steps"] for row in rows] == schedule.visits.tolist()
    assert [row["score"] for row in rows] == schedule.scores.tolist()


def test_processes_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scores may differ in the last bit, and a choice that differed would stop the reducer for ever."""
    schedule = attached(Toy(6), frozen=0.5)
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6], dtype=torch.float64)

    def broadcast(tensor: Tensor, src: int) -> None:
        assert src == 0
        tensor.copy_(first)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    schedule.begin_step(50)
    assert schedule._now == [3, 4, 5]
    assert torch.equal(schedule.scores, first[0])
    assert schedule.visits.tolist() == [1] * 6


@pytest.mark.distributed
def test_under_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, wrapped = tiny("vit").train(), tiny("vit").train()
        parallel = DistributedDataParallel(wrapped, find_unused_parameters=True)
        for model, call in ((plain, plain), (wrapped, parallel)):
            schedule = attached(model, frozen=0.5)
            assert schedule.optimizer is not None
            for step in range(5):
                schedule.begin_step(step)
                call(**batch("vit")).loss.backward()
                assert {n for n, p in model.named_parameters() if p.grad is not None} == training(model)
                schedule.optimizer.step()
                schedule.optimizer.zero_grad()
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    finally:
        dist.destroy_process_group()
