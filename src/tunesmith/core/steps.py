"""Telling adapters where an optimizer step begins and ends, in a Trainer and in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.adapter import Adapter, each_adapter


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


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What the adapters on `model` need from a Trainer: pass it as `Trainer(callbacks=...)`; empty if nothing."""
    needs = any(isinstance(m, Adapter) and m.has_steps for m in model.modules())
    return [AdapterSteps()] if needs else []


@contextmanager
def step(model: nn.Module, number: int) -> Iterator[None]:
    """Around one optimizer step, `number` counted from 0: forward, backward, `optimizer.step()`."""
    _begin(model, number)
    yield
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
