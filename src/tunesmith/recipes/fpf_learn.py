"""What FPF does to a model: steps with counted FLOPs, the movement of groups of tensors, and the phase itself.

moved = Movement(model)                        # before each epoch of the stream: moved.begin()
changes.append(moved.end())                    # {group: mean |theta(e) - theta(e - 1)|}
S = sensitivity(changes, switches)             # {group: changes after a switch / in other epochs}
finetune(model, pick(groups(model), ["norm", "last"]), batches, lr=0.05)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.meters import flops
from tunesmith.core.seeds import Key, forked
from tunesmith.errors import TunesmithError
from tunesmith.schedules.prone_modules import DEFAULT, ProneModules, groups

Batch = Mapping[str, Any]


# Costs ----------------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """FLOPs by what they were for. A kind of step is counted once for each shape of its batch, and then known."""

    known: dict[str, int] = field(default_factory=dict)
    total: Counter[str] = field(default_factory=Counter)

    def run(self, kind: str, about: str, batch: Batch, run: Callable[[], Any]) -> None:
        """Run a step of `kind`; `about` is what else its cost depends on."""
        shapes = ",".join(f"{k}{list(v.shape)}" for k, v in sorted(batch.items()) if isinstance(v, Tensor))
        key = f"{kind} {about} {shapes}"
        if key in self.known:
            run()
        else:
            self.known[key] = flops(run)
        self.total[kind] += self.known[key]


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """How a step is done.

    Attributes:
        clip: Bound on the gradient's norm; 0 for none.
        bf16: Autocast to bfloat16.
        seed: Of dropout.
    """

    clip: float = 0.0
    bf16: bool = False
    seed: int = 0

    def step(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        *keys: Key,
        logits: Tensor | None = None,
        distillation: float = 0.0,
    ) -> Tensor:
        """One step of the optimizer; the logits of the batch, detached.

        Args:
            model: Whose output has `loss` and `logits`.
            batch: Its keyword arguments, with labels.
            optimizer: Over what trains.
            keys: Of this step.
            logits: What the batch's logits were, (rows, classes).
            distillation: Weight of the mean squared difference to them.

        Raises:
            TunesmithError: the loss is not finite.
        """
        device = next(model.parameters()).device
        optimizer.zero_grad(set_to_none=True)
        with forked(self.seed, *keys, device=device):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                out = model(**batch)
            loss = out.loss
            if logits is not None and distillation:
                loss = loss + distillation * F.mse_loss(out.logits.float(), logits.to(device).float())
            if not bool(loss.detach().isfinite()):
                raise TunesmithError(f"fpf: the loss is {float(loss.detach())} in step {keys}; lower the learning rate")
            loss.backward()
        if self.clip:
            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(held, self.clip)
        optimizer.step()
        found: Tensor = out.logits.detach()
        return found


def sgd(model: nn.Module, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> torch.optim.SGD:
    """SGD over all that trains; biases and normalisations do not decay."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    matrices, others = ([p for p in wanted if (p.dim() > 1) == matrix] for matrix in (True, False))
    kinds = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD([kind for kind in kinds if kind["params"]], lr=lr, momentum=momentum)


def finetune(
    model: nn.Module,
    modules: Sequence[str],
    batches: Iterable[Batch],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loop: Loop | None = None,
    meter: Meter | None = None,
    keys: Sequence[Key] = (),
    logits: Iterable[Tensor] | None = None,
    distillation: float = 0.0,
) -> None:
    """A fine-tuning phase: SGD on batches of the buffer, by an optimizer of its own, for the chosen groups alone.

    Everything else keeps its bits, statistics of normalisation layers included (`prone-modules`).

    Args:
        model: In place.
        modules: Groups, as in `prone-modules`.
        batches: One per iteration.
        lr: Learning rate.
        momentum: Of this phase; it begins at zero and ends with it.
        weight_decay: Likewise.
        loop: How a step is done.
        meter: Counts FLOPs under `phases`.
        keys: Of the phase.
        logits: For each batch what its logits were when the rows came by.
        distillation: Weight of the mean squared difference to them.
    """
    loop, meter = loop or Loop(), meter if meter is not None else Meter()
    optimizer = sgd(model, lr, momentum, weight_decay)
    schedule = ProneModules(modules=list(modules))
    schedule.attach(model, optimizer)
    model.train()
    stored = iter(logits) if logits is not None else None
    try:
        for i, batch in enumerate(batches):
            schedule.begin_step(i)
            then = next(stored) if stored is not None else None

            def step(i: int = i, batch: Batch = batch, then: Tensor | None = then) -> None:
                loop.step(model, batch, optimizer, *keys, i, logits=then, distillation=distillation)

            meter.run("phases", "+".join(modules), batch, step)
    finally:
        schedule.detach()
        optimizer.zero_grad(set_to_none=True)


# Movement -------------------------------------------------------------------------------------------------------------


class Movement:
    """How much the tensors of each group move in an epoch, that of fine-tuning phases in between left out.

    Args:
        model: That is watched; a copy of its tensors is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.groups = model, groups(model)
        self.reference: dict[str, Tensor] = {}

    def _named(self) -> dict[str, Tensor]:
        held = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {n: held[n].detach() for names in self.groups.values() for n in names}

    def copy(self) -> dict[str, Tensor]:
        """The tensors as they are now."""
        return {n: t.clone() for n, t in self._named().items()}

    def begin(self) -> None:
        """An epoch begins."""
        self.reference = self.copy()

    def skip(self, before: Mapping[str, Tensor]) -> None:
        """Leave out what happened since `before = copy()`."""
        for name, tensor in self._named().items():
            self.reference[name] += tensor - before[name]

    def end(self) -> dict[str, float]:
        """C_l of the epoch: the mean of |theta(e) - theta(e - 1)| over all entries of the group."""
        now, found = self._named(), {}
        for label, names in self.groups.items():
            count = sum(now[n].numel() for n in names)
            found[label] = sum(float((now[n] - self.reference[n]).double().abs().sum()) for n in names) / count
        return found


def switched(epoch: int, per_task: int) -> bool | None:
    """Whether an epoch of the stream is the first after a switch of task.

    None for the very first one, which belongs to neither kind: it begins a task, but there is none before it, and what
    moves most in it comes from its start (running variances from 1, say).
    """
    return None if epoch == 0 else epoch % per_task == 0


def sensitivity(changes: Sequence[Mapping[str, float]], switches: Sequence[bool | None]) -> dict[str, float]:
    """S_l: the mean of C_l in the epochs right after a switch of task, over its mean in the others.

    Args:
        changes: C_l of each epoch.
        switches: From `switched`, for each.

    Returns:
        By group, the most sensitive first; empty as long as there is no epoch of both kinds. Groups that did not move
        in the others are left out.
    """
    found: dict[str, float] = {}
    for label in changes[0] if changes else ():
        after = [c[label] for c, switch in zip(changes, switches, strict=True) if switch]
        others = [c[label] for c, switch in zip(changes, switches, strict=True) if switch is False]
        if after and sum(others) > 0:
            found[label] = (sum(after) / len(after)) / (sum(others) / len(others))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def sizes(model: nn.Module) -> dict[str, int]:
    """Numbers in each group, running statistics included."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return {label: sum(held[n].numel() for n in names) for label, names in groups(model).items()}


def select(
    sensitive: Mapping[str, float], numbers: Mapping[str, int], budget: float, start: Sequence[str] = ()
) -> list[str]:
    """Groups in the order of their sensitivity, as many as the budget holds; one that is too large is passed over.

    Args:
        sensitive: From `sensitivity`.
        numbers: From `sizes`.
        budget: Share of all numbers.
        start: Groups that are in anyway, and are counted.
    """
    chosen = list(start)
    left = budget * sum(numbers.values()) - sum(numbers[label] for label in chosen)
    for label in sensitive:
        if label not in chosen and numbers[label] <= left:
            chosen.append(label)
            left -= numbers[label]
    return chosen


def usual(model: nn.Module, *, domain: bool) -> list[str]:
    """The paper's groups: normalisation layers with their statistics, the last layer, and the first where the domain
    of the inputs changes (there is none where the embedding is the head as well)."""
    found = [label for label in groups(model) if label.split(".")[0] in DEFAULT]
    return sorted(found) + (["first"] if domain and "first" in groups(model) else [])
