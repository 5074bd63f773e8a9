"""Telling adapters where an optimizer step begins and ends, in a Trainer and in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.adapter import Adapter, Step
from tunesmith.errors import TunesmithError


class AdapterSteps(TrainerCallback):
    """Calls `begin_step` and `end_step` of the adapters that have them."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        _begin(model, _step(state, optimizer))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        _end(model, _step(state, optimizer))


def _step(state: TrainerState, optimizer: Any) -> Step:
    total = state.max_steps if state.max_steps > 0 else None
    return Step(state.global_step, total, getattr(optimizer, "optimizer", optimizer))


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
def step(
    model: nn.Module, number: int, total: int | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Around one optimizer step: forward, backward, `optimizer.step()`. Call `zero_grad()` after the block.

    Args:
        model: With adapters of ours.
        number: Of the step, from 0.
        total: Steps of the whole run, which some methods need to know.
        optimizer: That steps in the block, which some methods need to know.
    """
    here = Step(number, total, optimizer)
    _begin(model, here)
    try:
        yield
    finally:
        _end(model, here)


def _groups(model: nn.Module) -> list[list[Adapter]]:
    """The adapters in force that have steps, together what belongs together: one method in one PEFT adapter."""
    found: dict[tuple[type, str], list[Adapter]] = {}
    for made in in_force(model):
        if made.has_steps:
            found.setdefault((type(made), made.group), []).append(made)
    return list(found.values())


def in_force(model: nn.Module) -> list[Adapter]:
    """The adapters of a model that are switched on, in its order; all of them where PEFT does not hold them."""
    idle: set[Adapter] = set()
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        held = getattr(module, "tunesmith_adapters", None)
        if held is not None and active is not None:
            idle |= {made for name, stack in held.items() if name not in active for made in stack}
    return [m for m in model.modules() if isinstance(m, Adapter) and m not in idle]


def _begin(model: nn.Module, here: Step) -> None:
    for adapters in _groups(model):
        type(adapters[0]).begin(adapters, here)
        for made in adapters:
            made.stepping = True


def _end(model: nn.Module, here: Step) -> None:
    for adapters in _groups(model):
        type(adapters[0]).end(adapters, here)
