"""GreenTrainer: trains the tensors that lower the loss most within a bound on the FLOPs of training.

Huang, Yin, Huang and Gao, "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR
2024 (section 3).

    t_dw,k   FLOPs of the gradient of tensor k;   t_dy,k   FLOPs of bringing the gradient to its output from the next's
    I_k = -sum(dL/dw_k(w + dw) dw_k) / max |.|        dw: one real step of the optimizer on the batches of a step
    maximise sum over k in S of I_k  subject to  sum over S of t_dw,k + sum over k >= min(S) of t_dy,k <= B
    B = rho (forward + backward) - forward,  backward = sum of all t_dw and t_dy

The choice is made anew every `interval` epochs. Costs are traced from a forward pass of the model at hand
(`core/backward_cost.py`), on any architecture, adapters included; the choice is exact (`core/knapsack.py`).

Where we differ from the released code, which has formulas for OPT, BLOOM and T5: its search is not optimal (in 42 of
200 random cases of 8 tensors), because the deepest tensor that fits is never tried and a cost is taken for reachable
only where its last tensor was chosen at exactly that cost; costs that it rounds to zero are for free, and the deepest
tensor pays for the gradient of its input, which is not needed; its probe leaves two steps in Adam's moments, here
weights and optimizer state come back bit for bit; with no I_k above zero it trains nothing, here the best single
tensor. What is left out gives its optimizer state up, as everywhere in this room.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.backward_cost import BackwardCosts, trace
from tunesmith.core.knapsack import best_subset
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.errors import CheckpointError, TunesmithError

Share = Annotated[float, Field(gt=0, le=1)]
Unit = Literal["epochs", "steps"]
LEAST = 0.05
"""Share of the backward pass that is left where rho does not even pay for the forward pass."""


@part(
    paper="arXiv:2309.13192",
    refuses={
        "fsdp": "what trains of a sharded weight cannot change from step to step",
        "forward-only": "there is no backward pass whose FLOPs a choice of tensors could bound",
    },
)
class GreenTrainer(Schedule):
    """Tensors chosen by importance under a budget of FLOPs.

    Args:
        rho: FLOPs of a step, forward pass included, as a share of those of training everything that could train.
        interval: Epochs or steps from one choice to the next.
        every: What `interval` counts. In a loop of one's own, set `schedule.epoch` when an epoch begins.
    """

    brisk: ClassVar[Mapping[str, object]] = {"rho": 0.7, "interval": 2, "every": "steps"}
    measures: ClassVar[bool] = True

    def __init__(self, *, rho: Share = 0.4, interval: PositiveInt = 2, every: Unit = "epochs") -> None:
        super().__init__()
        self.rho, self.interval, self.every = rho, interval, every
        self.epoch = 0
        self.on_attach()

    def on_attach(self) -> None:
        """Begin without a choice."""
        self.turn: int | None = None
        self.selected: frozenset[str] = frozenset()
        self.costs = BackwardCosts()
        self.importance: dict[str, float] = {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.epoch = int(state.epoch or 0)
        super().on_step_begin(args, state, control)

    def active(self, step: int) -> Collection[str]:
        turn = (self.epoch if self.every == "epochs" else step) // self.interval
        if turn != self.turn:
            devices = {p.device for p in self.eligible.values() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=[*devices]):  # a loop of one's own may measure with dropout
                self.selected, self.turn = self._select(), turn
        return self.selected

    def report(self) -> list[dict[str, str | float | bool]]:
        """What the last choice of this process was made from: one row per tensor, in order of execution.

        Returns:
            `tensor`, its name; `importance`, I_k, 0 for what the budget rules out; `own` and `passing`, FLOPs of
            t_dw and t_dy; `trains`.
        """
        rows = zip(self.costs.names, self.costs.own, self.costs.passing, strict=True)
        worth, chosen = self.importance, self.selected
        return [
            {"tensor": n, "importance": worth.get(n, 0.0), "own": own, "passing": passing, "trains": n in chosen}
            for n, own, passing in rows
        ]

    def share(self) -> float:
        """FLOPs of a step with what this process chose last, as a share of those of training everything."""
        costs = self.costs
        return (costs.forward + costs.exact(self.selected)) / max(costs.forward + costs.full, 1)

    # Choosing -----------------------------------------------------------------------------------------------------

    def _select(self) -> frozenset[str]:
        self.costs = costs = trace(self.measure, self.eligible)
        budget = self._budget(costs)
        # Processes must agree before the probe as well, which adds their gradients up.
        affordable = self._agreed([name for name in costs.names if costs.bound([name]) <= budget])
        if not affordable:
            cheapest = min(costs.names, key=lambda name: costs.bound([name]))
            least = (costs.forward + costs.bound([cheapest])) / (costs.forward + costs.full)
            raise TunesmithError(
                f"greentrainer: rho={self.rho:g} leaves {budget:.3g} FLOPs for the backward pass of a step, and the "
                f"cheapest tensor, {cheapest!r}, takes {costs.bound([cheapest]):.3g}; rho must be {least:.3g} or more"
            )
        self.importance = self._probe(affordable)
        values = [self.importance.get(name, float("-inf")) for name in costs.names]
        return self._agreed([costs.names[i] for i in best_subset(values, costs.own, costs.passing, budget)])

    def _budget(self, costs: BackwardCosts) -> int:
        budget = int(self.rho * (costs.forward + costs.full)) - costs.forward
        if budget > 0:
            return budget
        whole, budget = costs.forward + costs.full, int(LEAST * costs.full)
        warnings.warn(
            f"greentrainer: rho={self.rho:g} does not pay for the forward pass, which is {costs.forward / whole:.3g} "
            f"of a step; the backward pass gets {LEAST:.0%} of its full cost, which is rho="
            f"{(costs.forward + budget) / whole:.3g}",
            stacklevel=2,
        )
        return budget

    def _agreed(self, chosen: Collection[str]) -> frozenset[str]:
        """The choice of the first process: batches of other lengths cost others a little more or less."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = next(iter(self.eligible.values())).device
            flags = torch.tensor([name in chosen for name in self.eligible], dtype=torch.uint8, device=device)
            dist.broadcast(flags, src=0)
            chosen = [name for name, flag in zip(self.eligible, flags.tolist(), strict=True) if flag]
        return frozenset(chosen)

    # Importance ---------------------------------------------------------------------------------------------------

    def _probe(self, names: Collection[str]) -> dict[str, float]:
        """I_k of these tensors; weights, gradients and optimizer state are afterwards as they were.

        Raises:
            TunesmithError: no gradient came, or a step changed nothing, or something is not finite.
        """
        assert self.optimizer is not None
        held = {name: p for name, p in self.eligible.items() if name in names}
        start = {name: p.detach().clone() for name, p in held.items()}
        for name, p in self.eligible.items():
            p.grad = None
            p.requires_grad_(name in held)
        try:
            with _borrowed(self.optimizer):
                self.backward()
                if all(p.grad is None for p in held.values()):
                    raise TunesmithError(
                        "greentrainer: no gradient was left after a backward pass; an optimizer that updates inside of "
                        "it (`per_layer`) cannot be probed"
                    )
                self._step(held)
                for p in held.values():
                    p.grad = None
                self.backward()
                drops = {name: _drop(p, start[name]) for name, p in held.items()}
        finally:
            with torch.no_grad():
                for name, p in held.items():
                    p.grad = None
                    p.copy_(start[name])
        largest = max(map(abs, drops.values()))
        if not 0 < largest < float("inf"):
            raise TunesmithError(
                f"greentrainer: a step of {type(self.optimizer).__name__} was to show what each tensor is worth, but "
                f"the largest change of the loss by one is {largest}; look at the loss and the learning rate"
            )
        return {name: drop / largest for name, drop in drops.items()}

    def _step(self, held: Mapping[str, Tensor]) -> None:
        """One step of the optimizer on the gradients that are there."""
        assert self.optimizer is not None
        if getattr(self.optimizer, "forward_only", False):  # it makes no use of gradients: a plain step along them
            with torch.no_grad():
                for p in held.values():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=1e-4)
            return
        for group in self.optimizer.param_groups:  # warm-up begins at zero, where a step would show nothing
            if float(group["lr"]) == 0 and "initial_lr" in group:
                group["lr"] = group["initial_lr"]
        self.optimizer.step()

    def training_state(self) -> dict[str, Tensor]:
        """What was chosen, over the names of what could train, and for which turn."""
        if self.turn is None:
            return {}
        return {
            "selected": torch.tensor([name in self.selected for name in self.eligible]),
            "turn": torch.tensor(self.turn),
        }

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the choice.

        Raises:
            CheckpointError: it is of another number of tensors.
        """
        flags = state["selected"].tolist()
        if len(flags) != len(self.eligible):
            raise CheckpointError(
                f"greentrainer: the checkpoint has chosen among {len(flags)} tensors, but {len(self.eligible)} can "
                "train here; resume with the same model and parts"
            )
        self.selected = frozenset(name for name, flag in zip(self.eligible, flags, strict=True) if flag)
        self.turn = int(state["turn"])


def _drop(p: Tensor, before: Tensor) -> float:
    """By how much the loss fell with the step of this tensor, to first order from where it led."""
    return 0.0 if p.grad is None else -float((p.grad.double() * (p.detach().double() - before.double())).sum())


@contextmanager
def _borrowed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimizer works on copies of its state and settings inside the block; the originals come back after it."""
    state, groups = dict(optimizer.state), [dict(group) for group in optimizer.param_groups]
    optimizer.state.update({key: copy.deepcopy(value) for key, value in state.items()})
    for group in optimizer.param_groups:
        group.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(kept)
