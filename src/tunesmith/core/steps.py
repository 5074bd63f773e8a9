"""Telling adapters where an optimizer step begins and ends, in a Trainer and in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.adapter import Adapter, each_adapter
from tunesmith.errors import TunesmithError


class AdapterSteps(TrainerCallback):
    """Calls `begin_step` and `end_step` of the adapters that have them."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        _begin(model, state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        _end(model)


class OwnRates(TrainerCallback):
    """Stops a Trainer whose optimizer does not know the learning rates that a part asks for."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        groups = getattr(optimizer, "optimizer", optimizer).param_groups if optimizer is not None else []
        if groups and not any("lr_ratio" in group for group in groups):
            raise TunesmithError(
                "a part on this model has parameters that learn at a rate of their own, and the optimizer has no group "
                "for them; put `tunesmith.TrainerMixin` before the Trainer class, or hand the Trainer an optimizer on "
                "which `tunesmith.set_lr_ratios(optimizer, model)` was called"
            )


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What the parts on `model` need from a Trainer: pass it as `Trainer(callbacks=...)`; empty if nothing."""
    needs = any(isinstance(m, Adapter) and m.has_steps for m in model.modules())
    rates = any(hasattr(m, "lr_ratios") and m.lr_ratios() for m in model.modules())
    return [*([AdapterSteps()] if needs else []), *([OwnRates()] if rates else [])]


@contextmanager
def step(model: nn.Module, number: int) -> Iterator[None]:
    """Around one optimizer step, `number` counted from 0: forward, backward, `optimizer.step()`."""
    _begin(model, number)
    try:
        yield
    finally:
        _end(model)


def _begin(model: nn.Module, number: int) -> None:
    def visit(made: Adapter) -> None:
        if made.has_steps:
            made.begin_step(number)
            made.stepping = True

    each_adapter(model, visit)


def _end(model: nn.Module) -> None:
    def visit(made: Adapter) -> None:
        if made.has_steps:
            made.end_step()

    each_adapter(model, visit)
