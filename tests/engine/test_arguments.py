"""A recipe's training section against what transformers makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tunesmith.engine.arguments import (
    ADAPTER_LR,
    EMBEDDED_ADAPTER_LR,
    EMBEDDED_FULL_LR,
    FULL_LR,
    arguments,
    learning_rate,
    total_steps,
)
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe
from tunesmith.recipe_fields import TrainSpec


class Numbers(Dataset):
    """Rows of one number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index)]), "labels": torch.zeros(1)}


class Line(torch.nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


def steps_of_transformers(folder: Path, rows: int, batch: int, accumulation: int, epochs: float) -> int:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(Line(), args, train_dataset=Numbers(rows))
    trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(8, 4, 1, 1), (9, 4, 1, 1), (9, 4, 2, 2), (3, 8, 4, 3), (10, 3, 3, 1.5), (7, 2, 3, 0.3), (1, 1, 1, 0.01)],
)
def test_steps_are_those_of_transformers(
    tmp_path: Path, rows: int, batch: int, accumulation: int, epochs: float
) -> None:
    train = {"batch_size": batch, "gradient_accumulation": accumulation, "epochs": epochs}
    expected = steps_of_transformers(tmp_path, rows, batch, accumulation, epochs)
    assert total_steps(Recipe(train=train), rows, 1) == expected


@settings(max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 9), st.integers(1, 8), st.integers(1, 4))
def test_an_epoch_sees_every_row_on_every_process(
    rows: int, batch: int, accumulation: int, world: int, epochs: int
) -> None:
    train = {"batch_size": batch, "gradient_accumulation": accumulation, "epochs": epochs}
    steps = total_steps(Recipe(train=train), rows, world)
    per_epoch = steps // epochs
    assert steps == per_epoch * epochs
    assert per_epoch * batch * accumulation * world >= rows
    assert (per_epoch - 1) * batch * accumulation * world < rows


def test_given_steps_and_the_usual_three_epochs() -> None:
    assert total_steps(Recipe(train={"steps": 7, "epochs": 2}), 10**6, 1) == 7
    assert total_steps(Recipe(train={"batch_size": 4}), 8, 1) == 6


def made(tmp_path: Path, steps: int = 400, own: bool = False, **fields: Any) -> transformers.TrainingArguments:
    recipe = Recipe.model_validate(fields)
    return arguments(recipe, tmp_path, steps=steps, own_optimizer=own, unused_parameters=False)


def test_learning_rate_depends_on_what_trains() -> None:
    assert learning_rate(Recipe(model="./large")) == ADAPTER_LR
    assert learning_rate(Recipe(model="./large", method="full")) == FULL_LR
    assert learning_rate(Recipe(model="./large", method="lisa")) == FULL_LR
    assert learning_rate(Recipe()) == EMBEDDED_ADAPTER_LR
    assert learning_rate(Recipe(method="full")) == EMBEDDED_FULL_LR
    for model in ("./large", "tiny-lm-m"):
        assert learning_rate(Recipe(model=model, method="full", train={"learning_rate": 3e-3})) == 3e-3


def test_the_defaults_are_those_that_the_field_explains() -> None:
    words = TrainSpec.model_fields["learning_rate"].description or ""
    for rate in (ADAPTER_LR, FULL_LR, EMBEDDED_ADAPTER_LR, EMBEDDED_FULL_LR):
        assert f"{rate:.0e}".replace("e-0", "e-") in words


def test_fields_arrive(tmp_path: Path) -> None:
    train = {"batch_size": 3, "gradient_accumulation": 2, "weight_decay": 0.1, "max_grad_norm": 0.0, "seed": 5}
    found = made(tmp_path, train={**train, "lr_schedule": "cosine", "gradient_checkpointing": True})
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (3, 2)
    assert (found.weight_decay, found.max_grad_norm, found.seed, found.data_seed) == (0.1, 0.0, 5, 5)
    assert (found.lr_scheduler_type, found.gradient_checkpointing, found.max_steps) == ("cosine", True, 400)
    assert (found.bf16, found.fp16, found.remove_unused_columns) == (False, False, False)
    assert made(tmp_path, train={"precision": "bf16"}).bf16


def test_warmup_is_a_share_or_a_number(tmp_path: Path) -> None:
    assert made(tmp_path, train={"warmup": 0.1}).get_warmup_steps(400) == 40
    assert made(tmp_path, train={"warmup": 25}).get_warmup_steps(400) == 25
    assert made(tmp_path, train={"warmup": 0}).get_warmup_steps(400) == 0
    assert made(tmp_path).get_warmup_steps(400) == math.ceil(0.03 * 400)


def test_how_often_follows_from_the_length(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert (found.eval_steps, found.save_steps, found.logging_steps) == (50, 100, 4)
    short = made(tmp_path, steps=2)
    assert (short.eval_steps, short.save_steps, short.logging_steps) == (1, 1, 1)
    asked = made(tmp_path, train={"eval_every": 3, "save_every": 5, "log_every": 7, "keep_checkpoints": 4})
    assert (asked.eval_steps, asked.save_steps, asked.logging_steps, asked.save_total_limit) == (3, 5, 7, 4)


def test_options_of_transformers_optimizers(tmp_path: Path) -> None:
    adam = made(tmp_path, optimizer={"name": "adamw_torch", "adam_beta2": 0.95, "adam_epsilon": "1e-6"})
    assert (adam.adam_beta2, adam.adam_epsilon) == (0.95, 1e-6), "YAML 1.1 reads 1e-6 as text"
    sgd = made(tmp_path, method="full", optimizer={"name": "sgd", "momentum": 0.5, "nesterov": True})
    trainer = transformers.Trainer(Line(), sgd, eval_dataset=Numbers(1))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.5, True)
    assert "galore" not in made(tmp_path, own=True, optimizer="galore").optim


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": {"name": "adamw_torch", "beta": 1}}, "adamw_torch has no option 'beta'; it has adam_beta1"),
        ({"optimizer": {"name": "adamw_torch", "adam_beta1": "much"}}, "optimizer.adam_beta1: expected a number"),
        ({"train": {"lr_schedule": "zigzag"}}, "train: zigzag is not a valid SchedulerType"),
    ],
)
def test_what_transformers_would_refuse_is_a_message(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(tmp_path, **fields)
