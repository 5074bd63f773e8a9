"""Parameters that learn at a rate of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import tunesmith
from tests.zoo import batch, tiny
from tunesmith.core.optimizer import set_lr_ratios


def rates(optimizer: torch.optim.Optimizer) -> dict[tuple[int, ...], float]:
    return {tuple(p.shape): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def prompted() -> torch.nn.Module:
    return get_peft_model(tiny("llama"), tunesmith.adapter("dept", num_virtual_tokens=3, rank=2, max_length=16))


def test_groups_are_split_once_and_hold_everything() -> None:
    model = prompted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.3)
    set_lr_ratios(optimizer, model)
    set_lr_ratios(optimizer, model)
    assert rates(optimizer) == pytest.approx({(3, 32): 0.3, (16, 2): 0.003, (2, 32): 0.003})
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}


def test_without_ratios_nothing_is_touched() -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    groups = list(optimizer.param_groups)
    set_lr_ratios(optimizer, model)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))


def test_the_schedule_of_a_trainer_keeps_the_ratio(tmp_path: Path) -> None:
    class Mine(tunesmith.TrainerMixin, Trainer): ...

    rows = [{key: value[0] for key, value in batch("llama", rows=1, seed=i).items()} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, lr_scheduler_type="linear", report_to="none", use_cpu=True
    )
    trainer = Mine(model=prompted(), args=args, train_dataset=rows)
    seen: list[dict[tuple[int, ...], float]] = []

    class Watch(tunesmith.Schedule):
        def on_step_begin(self, *args: object, optimizer: torch.optim.Optimizer, **_: object) -> None:
            seen.append(rates(getattr(optimizer, "optimizer", optimizer)))

    trainer.add_callback(Watch)
    trainer.train()
    assert [s[(3, 32)] for s in seen] == pytest.approx([0.1, 0.05])
    assert [s[(16, 2)] for s in seen] == pytest.approx([0.001, 0.0005])
