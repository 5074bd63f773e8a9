"""What is special to half fine-tuning; the choice itself is tested in tests/core/test_halves.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.zoo import batch, tiny
from tunesmith import catalog
from tunesmith.core.halves import chosen
from tunesmith.core.merging import merged
from tunesmith.core.meters import flops, grad_bytes, state_bytes
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.merging.half_reset import HalfReset
from tunesmith.schedules.half_finetuning import HalfFinetuning


def attached(model: nn.Module, **options: Any) -> HalfFinetuning:
    schedule = HalfFinetuning(**options)
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_one_half_for_a_run_and_another_for_each_stage() -> None:
    model = tiny("llama", num_hidden_layers=4)
    halves = []
    for stage in range(3):
        schedule = attached(model, stage=stage)
        seen = {frozenset(schedule.active(step)) for step in range(20)}
        assert len(seen) == 1
        halves.append(seen.pop())
        schedule.detach()
    assert len(set(halves)) == 3
    assert halves[0] == chosen([n for n, _ in model.named_parameters()])


def test_drawn_anew_every_so_many_steps() -> None:
    schedule = attached(tiny("llama", num_hidden_layers=4), interval=3)
    seen = [schedule.active(step) for step in range(12)]
    assert all(seen[i] == seen[i - i % 3] for i in range(12))
    assert len({frozenset(half) for half in seen}) == 4
    assert schedule.active(0) == seen[0]


def test_what_stands_outside_of_the_blocks() -> None:
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert outside < set(attached(tiny("llama")).active(0))
    assert not outside & set(attached(tiny("llama"), outside="freeze").active(0))


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_the_merge_knows_the_half_that_trained(level: str) -> None:
    """What was tuned by halves is left as it is by a reset with the same options, and not by one with another stage."""
    model = tiny("llama", num_hidden_layers=4).train()
    base = Checkpoint({n: t.clone() for n, t in model.state_dict().items()})
    schedule = attached(model, level=level, stage=2, seed=5)
    assert schedule.optimizer is not None
    for step in range(3):
        schedule.begin_step(step)
        model(**batch("llama")).loss.backward()
        schedule.optimizer.step()
        schedule.optimizer.zero_grad()
    tuned = Checkpoint(model.state_dict())
    changed = {n for n in base if not torch.equal(base[n], tuned[n])}
    assert changed == set(schedule.active(0))
    kept = merged(HalfReset(level=level, stage=2, seed=5), [tuned], base)
    assert all(torch.equal(kept[n], tuned[n]) for n in tuned)
    other = merged(HalfReset(level=level, stage=3, seed=5), [tuned], base)
    assert any(not torch.equal(other[n], tuned[n]) for n in tuned)


def test_bytes_and_flops_are_those_of_the_half() -> None:
    model, given = tiny("llama", num_hidden_layers=4).train(), batch("llama")
    full = flops(lambda: model(**given).loss.backward())
    schedule = attached(model)
    assert schedule.optimizer is not None
    schedule.begin_step(0)
    resting = [p for n, p in model.named_parameters() if not p.requires_grad and p.dim() == 2]
    tokens = given["input_ids"].numel()
    assert full - flops(lambda: model(**given).loss.backward()) == sum(2 * tokens * p.numel() for p in resting)
    model.zero_grad()
    held = [p for p in model.parameters() if p.requires_grad]
    with grad_bytes(model) as peak:
        model(**given).loss.backward()
    assert peak.bytes == sum(4 * p.numel() for p in held)
    schedule.optimizer.step()
    assert state_bytes(schedule.optimizer) == sum(8 * p.numel() + 4 for p in held)


def test_adapters_train_where_their_layers_are_in_the_half() -> None:
    plain = tiny("llama", num_hidden_layers=4)
    half = chosen([n for n, _ in plain.named_parameters()])
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear"))
    attached(model).begin_step(0)
    layers = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in training(model)}
    assert {f"{layer}.weight" for layer in layers} == {n for n in half if "proj" in n}


def test_a_half_that_holds_nothing_is_an_error() -> None:
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen([n for n, _ in model.named_parameters()], outside="freeze"))
    resting = tiny("llama")
    for (name, p), q in zip(resting.named_parameters(), model.parameters(), strict=True):
        p.requires_grad_(".layers." in name and not q.requires_grad)
    with pytest.raises(
        TunesmithError, match=r"none of the \d parameters that train is in the half of seed 0, stage 0, draw 0"
    ):
        attached(resting).begin_step(0)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no name has a numbered block"):
        attached(nn.Linear(2, 2))


@pytest.mark.parametrize("options", [{"level": "row"}, {"stage": -1}, {"interval": 0}, {"outside": "both"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        catalog.get("half-finetuning").validate(options)


@pytest.mark.distributed
def test_under_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, wrapped = (tiny("llama", num_hidden_layers=4).train() for _ in range(2))
        parallel = DistributedDataParallel(wrapped, find_unused_parameters=True)
        for model, call in ((plain, plain), (wrapped, parallel)):
            schedule = attached(model, interval=1)
            assert schedule.optimizer is not None
            for step in range(4):
                schedule.begin_step(step)
                call(**batch("llama")).loss.backward()
                schedule.optimizer.step()
                schedule.optimizer.zero_grad()
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True)
        )
    finally:
        dist.destroy_process_group()
