"""The schedule contract: which parameters train at a step.

A schedule is a transformers `TrainerCallback`; in a loop of one's own, call `attach(model, optimizer)` once and
`begin_step(step)` before each optimizer step. What it leaves out gets no gradient, does not change, and holds no
optimizer state; a parameter that comes back starts with fresh state, its step counter included (a method may say that
it keeps the state instead). The optimizer must have been built over everything that may ever train.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.modelmap import block_linears
from tunesmith.core.stats import collect
from tunesmith.errors import TunesmithError


class Schedule(TrainerCallback):
    """Chooses what trains. Options are keyword-only parameters of `__init__`.

    `active(step)` should depend on the step and the options alone (draw with `core.seeds`): a resumed run then needs
    no state, and processes agree. A method that learns what to choose keeps that in `training_state`, and learns from
    `measure()` or `backward()`, which are the same in every process; what it needs to know of the data before
    the first step are `statistics`.

    Attributes:
        brisk: Options under which the choice changes within a few steps of a small model, for tests.
        measures: Whether the method calls `measure` or `backward`.
        statistics: Names of what `prepare` wants to know of the linear layers of the blocks; see `core.stats`. A run
            calls `calibrate` by itself; in a loop of one's own, call it before the first step.
        adapters_only: Whether it works on models with adapters alone.
        keeps_state: Whether what rests keeps its optimizer state, for methods that choose anew in every step: Adam
            would begin anew as often.
    """

    brisk: ClassVar[Mapping[str, object]] = {}
    measures: ClassVar[bool] = False
    adapters_only: ClassVar[bool] = False
    keeps_state: bool = False
    statistics: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._measure: Callable[[], float] | None = None
        self._backward: Callable[[], None] | None = None
        self._restored: Mapping[str, Tensor] | None = None
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.eligible: dict[str, nn.Parameter] = {}

    def active(self, step: int) -> Collection[str] | None:
        """Names of the eligible parameters that train at optimizer step `step` (from 0); None for no change."""
        raise TypeError(f"{type(self).__name__} does not define active")

    def on_attach(self) -> None:
        """Called when `model` and `eligible` are known, before the first step: look up what the method needs."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to govern everything in `model` that requires a gradient now.

        Raises:
            TunesmithError: the optimizer does not hold all of it, so what is chosen later would never be updated.
        """
        if self.model is model:
            self.detach()  # a run that was interrupted has left its last choice behind
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)
        self.eligible = {name: p for name, p in model.named_parameters() if p.requires_grad}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.eligible.items() if id(p) not in held]
        if missing:
            raise TunesmithError(
                f"{type(self).__name__}: the optimizer holds {len(held)} parameters, but not {missing[0]!r} and "
                f"{len(missing) - 1} others that the schedule may choose later; build it over all of them first"
            )
        self.on_attach()
        if self._restored is not None:
            self.load_training_state(self._restored)
            self._restored = None

    def measure(self) -> float:
        """Loss of the model as it is now on the batches of the step that begins: evaluation mode, no gradients, the
        mean over all processes.

        Raises:
            TunesmithError: nobody said how: the Trainer is without `TrainerMixin`, or `begin_step` without `measure`.
        """
        if self._measure is None:
            raise TunesmithError(
                f"{type(self).__name__} looks at the loss of a step's batches before it: put `tunesmith.TrainerMixin` "
                "before the Trainer class, or call `begin_step(step, measure=...)` with a function that gives it"
            )
        return self._measure()

    def backward(self) -> None:
        """Add the gradients of the loss on the batches of the step that begins to what requires one: evaluation mode,
        added up over the step's micro-batches and averaged over all processes. Set them to None afterwards.

        Raises:
            TunesmithError: nobody said how: the Trainer is without `TrainerMixin`, or `begin_step` without `backward`.
        """
        if self._backward is None:
            raise TunesmithError(
                f"{type(self).__name__} looks at the gradients of a step's batches before it: put "
                "`tunesmith.TrainerMixin` before the Trainer class, or call `begin_step(step, backward=...)` with a "
                "function that computes them"
            )
        self._backward()

    def calibrate(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Collect `statistics` in one pass over the batches and hand them to `prepare`.

        Args:
            model: As it is before the first step.
            batches: Keyword arguments of the model.
        """
        self.prepare(model, collect(model, block_linears(model), batches, want=self.statistics))

    def prepare(self, model: nn.Module, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Learn what the method wants to know beforehand; keep it in `training_state`, since a resumed run is not
        calibrated again.

        Args:
            model: As in `calibrate`.
            statistics: By the name of the layer, then of the statistic.
        """

    def training_state(self) -> dict[str, Tensor]:
        """What a resumed run needs; kept in checkpoints."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `training_state` gave; called after `on_attach`."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Keep the state of a checkpoint until the schedule is attached."""
        self._restored = dict(state)

    def begin_step(
        self,
        step: int,
        measure: Callable[[], float] | None = None,
        backward: Callable[[], None] | None = None,
    ) -> None:
        """Set what trains in optimizer step `step`; call it before the step's first micro-batch.

        Args:
            step: From 0.
            measure: Gives the loss of the model on the step's batches, for methods that ask (`measures`).
            backward: Adds its gradients to what requires one, likewise.
        """
        self._measure = measure or self._measure
        self._backward = backward or self._backward
        chosen = self.active(step)
        if chosen is None:
            return
        unknown = set(chosen) - self.eligible.keys()
        if unknown:
            raise TunesmithError(f"{type(self).__name__} chose {sorted(unknown)[:3]}, which do not train in this model")
        chosen = set(chosen)
        assert self.optimizer is not None
        for name, p in self.eligible.items():
            if name in chosen:
                p.requires_grad_(True)
            elif p.requires_grad or p.grad is not None or p in self.optimizer.state:
                p.requires_grad_(False)
                p.grad = None
                if not self.keeps_state:
                    self.optimizer.state.pop(p, None)

    def detach(self) -> None:
        """Let everything train again."""
        for p in self.eligible.values():
            p.requires_grad_(True)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        self.attach(model, optimizer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.begin_step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.detach()
