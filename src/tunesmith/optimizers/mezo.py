"""MeZO: fine-tune by forward passes alone, in the memory of inference.

Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, "Fine-Tuning Language Models with Just Forward Passes", NeurIPS
2023.

    g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps),   z_i ~ N(0, I), i = 1..n             (Definition 1)
    theta <- (1 - lr * weight_decay) theta - lr / n sum_i g_i z_i                                    (Algorithm 1)

z is drawn again from its seed whenever it is needed, so that a step leaves a seed and a number. Where we differ from
the released code: z comes from generators of our own, addressed by (seed, tensor, block), so the user's random numbers
stay as they were, a resumed run is bitwise the same, and what exists of z is a block and not the largest tensor; the
way there and back is + - - + in equal steps, which nearly ends the drift of half-precision weights, and
`restore="exact"` ends it; a loss that is not finite is left out and counted.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.directions import BLOCK_SIZE, Directions, Noise, descend_
from tunesmith.core.optimizer import Closure, Optimizer
from tunesmith.core.part import part
from tunesmith.core.seeds import seed_of
from tunesmith.core.trace import Trace
from tunesmith.errors import RecipeError, TunesmithError

_RUN = "run"


@part(
    paper="arXiv:2305.17333",
    tags=("forward-only",),
    refuses={"fsdp": "a tensor that is sharded would get the same direction on the shard of every process"},
)
class MeZO(Optimizer):
    """Zeroth-order SGD in place.

    The loss may be any number, also one without a gradient such as minus the accuracy. The model must be in evaluation
    mode: dropout would make the two sides different functions.

    Args:
        params: Parameters or groups; what requires no gradient is left alone.
        lr: Learning rate; it must be far below a first-order one, and about as many times smaller as more trains.
        weight_decay: Decoupled; `MeZO.groups` gives none to biases and norms.
        eps: Size of the perturbation: 1e-3 for all weights, 1e-2 for LoRA, 1e-1 for a prefix (the paper's).
        samples: n, directions per step.
        restore: `add` goes back by adding, and keeps nothing; `exact` brings back every bit, for the memory of those
            numbers that would not come back.
        seed: Of all directions of the run.
        block_size: Numbers drawn at a time, which bounds the extra memory at 4 bytes each (8 for half precision).
        noise: Draw on the weights' own `device`, or on the `cpu`, slower, for a trace that any device can replay.
        trace: Keep seeds and coefficients, from which `optimizer.trace.replay_` makes the run's end from its start.
        checkpoint: What checkpoints of a Trainer hold: all weights, or the trace, from which a resumed run makes them
            again from the model that it began with; that needs `restore="exact"`.
    """

    forward_only: ClassVar[bool] = True
    _found: list[tuple[int, float]] | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        eps: PositiveFloat = 1e-3,
        samples: PositiveInt = 1,
        restore: Literal["add", "exact"] = "add",
        seed: int = 0,
        block_size: PositiveInt = BLOCK_SIZE,
        noise: Noise = "device",
        trace: bool = False,
        checkpoint: Literal["weights", "trace"] = "weights",
    ) -> None:
        if checkpoint == "trace" and restore != "exact":
            raise RecipeError(
                "mezo: checkpoint='trace' replays the steps alone, and restore='add' leaves roundings of the way there "
                "and back in the weights; take restore='exact'"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.eps, self.samples, self.restore = eps, samples, restore
        self.block_size, self.noise, self.checkpoint = block_size, noise, checkpoint
        # The key is not a parameter: a schedule that freezes one takes its state, and the count must go on.
        self.state[_RUN] = {"step": 0, "skipped": 0, "seed": seed}
        if trace or checkpoint == "trace":
            self.state[_RUN]["trace"] = {**vars(Trace(self._directions().fingerprint()))}

    def _directions(self) -> Directions:
        return Directions(self.param_groups, block_size=self.block_size, noise=self.noise)

    @property
    def trace(self) -> Trace:
        """The run so far.

        Raises:
            TunesmithError: the optimizer was made without `trace=True`.
        """
        if "trace" not in self.state[_RUN]:
            raise TunesmithError("MeZO kept no trace of this run; make it with `trace=True`")
        return Trace(**self.state[_RUN]["trace"])

    def log(self) -> Trace | None:
        """The trace, with `checkpoint="trace"`."""
        return self.trace if self.checkpoint == "trace" else None

    @property
    def skipped(self) -> int:
        """Estimates left out because a loss was not finite."""
        return self.state[_RUN]["skipped"]

    @torch.no_grad()
    def estimate(self, closure: Closure) -> Tensor:
        """Measure the slope along `samples` directions; the parameters are as before when it returns.

        Returns:
            The mean of the losses that were measured, ().
        """
        run, directions = self.state[_RUN], self._directions()
        if "trace" in run and not run["step"]:  # before a probe: restore="add" leaves roundings behind
            run["trace"]["base"] = directions.contents()
        found, losses = [], []
        for sample in range(self.samples):
            seed = seed_of(run["seed"], "mezo", run["step"], sample)
            probe = directions.probe(closure, seed, self.eps, exact=self.restore == "exact")
            losses += [probe.plus, probe.minus]
            if math.isfinite(probe.coefficient):
                found.append((seed, probe.coefficient))
                continue
            run["skipped"] += 1
            warnings.warn(
                f"MeZO: step {run['step']}: the losses {float(probe.plus):g} and {float(probe.minus):g} give no slope; "
                f"the estimate is left out ({run['skipped']} so far). Lower `lr` if it goes on.",
                stacklevel=3,
            )
        self._found = found
        return torch.stack(losses).mean()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Apply the last estimate; with a closure, make it first.

        Args:
            closure: Returns the loss, (); it is called 2 `samples` times and needs no backward pass.

        Raises:
            TunesmithError: there is no estimate to apply.
        """
        loss = None if closure is None else self.estimate(closure)
        if self._found is None:
            raise TunesmithError("MeZO: step() has no estimate to apply; call estimate(closure) or step(closure)")
        (found, self._found), run = (self._found, None), self.state[_RUN]
        run["step"] += 1
        if not found:
            return loss
        directions = self._directions()
        lr = [group["lr"] for group in self.param_groups]
        decay = [group["lr"] * group["weight_decay"] for group in self.param_groups]
        rates = [rate / len(found) for rate in lr]
        if "trace" in run:
            self._record(directions, found, rates, decay)
        descend_(directions, found, rates, decay)
        return loss

    def _record(
        self, directions: Directions, found: list[tuple[int, float]], rates: list[float], decay: list[float]
    ) -> None:
        if directions.fingerprint() != self.trace.fingerprint:
            raise TunesmithError(
                "MeZO: the tensors that train are no longer those that the trace began with, so it could not be "
                "replayed; leave `trace` off where a schedule freezes and unfreezes"
            )
        self.trace.record(found, rates, decay)

    def state_formula(self) -> int:
        """Bytes of state: none, whatever the model."""
        return 0
