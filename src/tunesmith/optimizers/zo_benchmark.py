"""Zeroth-order benchmark: six optimizers without backpropagation and three enhancements, behind one interface.

Zhang, Li, Hong, Li, Zhang, Zheng, Chen, Lee, Yin, Hong, Wang, Liu and Chen, "Revisiting Zeroth-Order Optimization for
Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024. With z_i ~ N(0, I), i = 1..q, and c_i the slope of the loss
of the batch along z_i:

    central           c = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
    one-sided         c = (L(theta + eps z) - L(theta)) / eps
    forward gradient  c = <grad L(theta), z>, by forward-mode differentiation, without eps
    g = sum_i c_i z_i / q
    sgd  theta <- theta - lr g           sign  theta <- theta - lr sign(g), entry by entry
    momentum  m <- mu m + g, theta <- theta - lr m                                  adam  Adam's moments of g
    conservative  theta <- the one of theta - lr g, theta, theta + lr g with the lowest loss on the batch

Enhancements: *block-wise*, one part of the model after the other is measured and moved, with its own passes over the
same batch; *hybrid*, the top blocks follow their true gradient, for which only they keep activations; *sparse*, z is
masked at random, with one share for all tensors, or with each tensor's share of the globally smallest weights. z and
masks are drawn from keys (`core/directions.py`) and never stored. Central, sgd and q = 1 is MeZO, bit for bit.

Where we differ from the released code: `sign` is the paper's, of each entry; theirs, the sign of c times z, is
`scalar-sign`. Their random mask compares a normal number with the ratio, which at 0.9 masks 81.6 % and at 0.1 54 %;
ours masks what was asked. In their block-wise runs blocks of equal shape get the same z; here no two are alike.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.directions import BLOCK_SIZE, Directions, Noise, descend_, pieces, rounded
from tunesmith.core.masks import Mask, smaller_shares
from tunesmith.core.optimizer import Closure, Optimizer, decay_groups, keep_saved_dtypes
from tunesmith.core.part import part
from tunesmith.core.rules import Rule
from tunesmith.core.seeds import seed_of
from tunesmith.core.tangents import gradients
from tunesmith.core.units import Unit, standings
from tunesmith.errors import TunesmithError

_RUN = "run"
_RULES: dict[str, Any] = {"scalar-sign": "sign", "conservative": "sgd"}
"""Of first-order blocks, where it is not the update's own name."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Update = Literal["sgd", "sign", "scalar-sign", "momentum", "adam", "conservative"]
Found = list[tuple[int, float]]
"""Seeds with their slopes."""


@part(
    paper="arXiv:2402.11592",
    tags=("forward-only",),
    refuses={"fsdp": "a tensor that is sharded would get the same direction on the shard of every process"},
)
class ZOBenchmark(Optimizer):
    """Zeroth-order and forward-gradient optimizers.

    The loss may be any number, except that a forward gradient and a hybrid need one that can be derived. The model must
    be in evaluation mode: dropout would make the sides of a difference different functions.

    Args:
        params: Parameters or groups; block-wise and hybrid runs need those of `groups`.
        lr: Learning rate; for all but `adam` and `sign` it must be far below a first-order one.
        weight_decay: Decoupled; `ZOBenchmark.groups` gives none to biases and norms. Not with `conservative`.
        estimator: Two-sided difference, one-sided difference, or forward gradient, one pass but a tangent beside every
            activation and a whole z.
        update: What is made of the estimate. `scalar-sign` is sgd with the signs of the slopes.
        samples: q, directions per step.
        eps: Size of the perturbation: 1e-3 for all weights, 1e-2 for LoRA, 1e-1 for a prefix.
        unit: What is measured and moved at a time: the whole `model`, a `block`, the attention or MLP of a block
            (`module`), or a `linear` layer; what is outside of the blocks is one below and one above.
        sparsity: Share of the entries of z that are zero.
        sparsity_by: `uniform`, the same share in every tensor; `magnitude`, each tensor's share of those weights that
            are the smallest `sparsity` of all.
        resample_steps: Steps between two masks.
        first_order: Blocks at the top that follow their gradient, with what is above them; the rest stays zeroth-order.
        first_order_ratio: Learning rate of those in multiples of `lr`.
        momentum: mu.
        betas: Of adam.
        adam_eps: Of adam, added to the root of the second moment.
        restore: `add` goes back by adding, and keeps nothing; `exact` brings back every bit, for the memory of those
            numbers that would not come back.
        seed: Of all directions and masks of the run.
        block_size: Numbers drawn at a time, which bounds the extra memory.
        noise: Draw on the `cpu`, the same numbers for every kind of device, or on the weights' own `device`, faster.
    """

    forward_only: ClassVar[bool] = True
    _pending: tuple[Directions, Found] | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        estimator: Literal["central", "one-sided", "forward-gradient"] = "central",
        update: Update = "sgd",
        samples: PositiveInt = 1,
        eps: PositiveFloat = 1e-3,
        unit: Unit = "model",
        sparsity: Beta = 0.0,
        sparsity_by: Literal["uniform", "magnitude"] = "uniform",
        resample_steps: PositiveInt = 1,
        first_order: NonNegativeInt = 0,
        first_order_ratio: PositiveFloat = 1.0,
        momentum: Beta = 0.9,
        betas: tuple[Beta, Beta] = (0.9, 0.999),
        adam_eps: PositiveFloat = 1e-8,
        restore: Literal["add", "exact"] = "add",
        seed: int = 0,
        block_size: PositiveInt = BLOCK_SIZE,
        noise: Noise = "cpu",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "unit": "", "first_order": False})
        self.estimator, self.update, self.samples, self.eps = estimator, update, samples, eps
        self.sparsity, self.sparsity_by, self.resample_steps = sparsity, sparsity_by, resample_steps
        self.first_order_ratio, self.restore = first_order_ratio, restore
        self.block_size, self.noise = block_size, noise
        self._rule = Rule(_RULES.get(update, update), momentum, betas, adam_eps, block_size)
        # The key is not a parameter: a schedule that freezes one takes its state, and the count must go on.
        self.state[_RUN] = {"step": 0, "skipped": 0, "seed": seed}
        if unit != "model" and not any(group["unit"] for group in self.param_groups):
            raise TunesmithError(f"unit={unit!r} needs the groups of `ZOBenchmark.groups(model, unit={unit!r})`")
        if first_order and not self._top:
            raise TunesmithError("first_order needs the groups of `ZOBenchmark.groups(model, first_order=...)`")
        if update == "conservative" and (first_order or any(group["weight_decay"] for group in self.param_groups)):
            raise TunesmithError(
                "update='conservative' promises that no step raises the loss of its batch; a weight decay or "
                "first-order blocks would move the weights besides. Set them to 0"
            )

    @classmethod
    def groups(cls, model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """What trains, with decay on what is neither bias nor normalisation; split by unit and order, bottom to top.

        Raises:
            ModelError: the model has no blocks, or not more than `first_order`.
        """
        made = decay_groups(model.named_parameters(), model, weight_decay)
        unit, top = options.get("unit", "model"), options.get("first_order", 0)
        if unit == "model" and not top:
            return made
        stands = standings(model, unit, top)
        of = {id(p): stands[name] for name, p in model.named_parameters()}
        return [
            {**group, "params": members, "unit": standing.unit, "first_order": standing.top}
            for standing in dict.fromkeys(stands.values())
            for group in made
            if (members := [p for p in group["params"] if of[id(p)] == standing])
        ]

    @property
    def _top(self) -> list[int]:
        return [index for index, group in enumerate(self.param_groups) if group["first_order"]]

    def _sweep(self) -> list[list[int]]:
        """Groups that are measured and moved together, bottom to top."""
        numbered = [(group["unit"], i) for i, group in enumerate(self.param_groups) if not group["first_order"]]
        return [[i for _, i in members] for _, members in itertools.groupby(numbered, key=lambda pair: pair[0])]

    def passes(self) -> int:
        """Calls of the closure in a step; a hybrid's last one has a backward pass."""
        q = self.samples
        each = {"central": 2 * q, "one-sided": q + 1, "forward-gradient": q}[self.estimator]
        if self.update == "conservative":
            each += 3 if self.estimator == "central" else 2
        return each * len(self._sweep()) + bool(self._top)

    @property
    def skipped(self) -> int:
        """Estimates left out because a loss was not finite."""
        return self.state[_RUN]["skipped"]

    def _directions(self, only: list[int], mask: Mask | None = None) -> Directions:
        return Directions(self.param_groups, block_size=self.block_size, noise=self.noise, only=only, mask=mask)

    # Measuring --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate(self, closure: Closure) -> Tensor:
        """Measure; the parameters are as before when it returns, except for all units but the last of a sweep.

        Those have moved: each unit is measured where the ones before it have gone.

        Returns:
            The mean of the losses that were measured, ().

        Raises:
            TunesmithError: the loss cannot be derived, where the options ask for that.
        """
        losses: list[Tensor] = []
        if self._top:
            losses.append(self._backward(closure))
        sweep = self._sweep()
        mask = self._mask([i for members in sweep for i in members])
        self._pending = None
        for members in sweep:
            self._descend()
            directions = self._directions(members, mask)
            # A schedule may have frozen all of a unit.
            self._pending = directions, self._measure(directions, closure, losses) if directions.blocks else []
        return torch.stack(losses or [closure()]).mean()

    def _measure(self, directions: Directions, closure: Closure, losses: list[Tensor]) -> Found:
        run, exact, here, found = self.state[_RUN], self.restore == "exact", None, Found()
        if self.estimator == "one-sided":
            here = closure()
            losses.append(here)
        for sample in range(self.samples):
            seed = seed_of(run["seed"], "mezo", run["step"], sample)
            if self.estimator == "forward-gradient":
                here, slope = directions.derivative(closure, seed)
                losses.append(here)
            elif here is not None:
                losses += directions.walk(closure, [[(seed, self.eps)], [(seed, -self.eps)]], exact=exact)
                slope = rounded((float(losses[-1]) - float(here)) / self.eps)
            else:
                probe = directions.probe(closure, seed, self.eps, exact=exact)
                losses += [probe.plus, probe.minus]
                slope = probe.coefficient
            if math.isfinite(slope):
                found.append((seed, slope))
            else:
                self._skip(losses[-1])
        return self._lowest(directions, closure, found, here) if self.update == "conservative" and found else found

    def _lowest(self, directions: Directions, closure: Closure, found: Found, here: Tensor | None) -> Found:
        """The estimate, the opposite, or nothing: where the loss is lowest; of equals, where it is."""
        rates = [group["lr"] / len(found) for group in self.param_groups]
        down, up = ([(seed, [sign * rate * c for rate in rates]) for seed, c in found] for sign in (-1, 1))
        stay = closure() if here is None else here
        ahead, behind = directions.walk(closure, [down, up + up, down], exact=self.restore == "exact")
        reached = [value if math.isfinite(value) else math.inf for value in map(float, (stay, ahead, behind))]
        sign = (0, 1, -1)[reached.index(min(reached))]
        return [(seed, sign * c) for seed, c in found] if sign else []

    def _backward(self, closure: Closure) -> Tensor:
        held = [(p, group["first_order"]) for group in self.param_groups for p in group["params"] if p.requires_grad]
        top = [p for p, first in held if first]
        loss = gradients(closure, top, [p for p, first in held if not first])
        if not math.isfinite(float(loss)):
            self._skip(loss)
            for p in top:
                p.grad = None
        return loss

    def _skip(self, loss: Tensor) -> None:
        run = self.state[_RUN]
        run["skipped"] += 1
        warnings.warn(
            f"ZOBenchmark: step {run['step']}: the loss {float(loss):g} gives no slope; the estimate is left out "
            f"({run['skipped']} so far). Lower `lr` if it goes on.",
            stacklevel=4,
        )

    def _mask(self, only: list[int]) -> Mask | None:
        if not self.sparsity:
            return None
        run = self.state[_RUN]
        number = run["step"] // self.resample_steps
        seed = seed_of(run["seed"], "mask", number)
        if self.sparsity_by == "uniform":
            return Mask(seed, self.sparsity)
        tensors: dict[int, list[Tensor]] = {}
        for block in self._directions(only).blocks:
            tensors.setdefault(block.place, []).append(block.part)
        if run.get("mask") != number or run["shares"].keys() != tensors.keys():
            run["mask"], run["shares"] = number, smaller_shares(tensors, self.sparsity)
            whole = f"{sum(share == 1 for share in run['shares'].values())} of {len(tensors)} tensors"
            if 1 in run["shares"].values() and not run.get("told"):
                run["told"] = True
                warnings.warn(
                    f"ZOBenchmark: {whole} hold only numbers among the smallest {self.sparsity:.0%} of all, such as "
                    "zeros, and do not train; take sparsity_by='uniform' if they should (a LoRA's B)",
                    stacklevel=4,
                )
        return Mask(seed, run["shares"])

    # Moving -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Apply the last estimate; with a closure, make it first.

        Args:
            closure: Returns the loss, (); it is called `passes()` times. Only a hybrid calls it with gradients enabled,
                once; it may then run the backward pass itself, as torch's closures do.

        Raises:
            TunesmithError: there is no estimate to apply.
        """
        loss = None if closure is None else self.estimate(closure)
        if self._pending is None:
            raise TunesmithError(
                "ZOBenchmark: step() has no estimate to apply; call estimate(closure) or step(closure)"
            )
        self._descend()
        self._follow_gradients()
        self.state[_RUN]["step"] += 1
        return loss

    def _descend(self) -> None:
        """Apply what is pending."""
        if self._pending is None:
            return
        (directions, found), self._pending = self._pending, None
        if not found:
            return
        lr = [group["lr"] for group in self.param_groups]
        decay = [group["lr"] * group["weight_decay"] for group in self.param_groups]
        if self.update in ("sgd", "conservative", "scalar-sign"):
            if self.update == "scalar-sign":
                found = [(seed, math.copysign(1.0, c) if c else 0.0) for seed, c in found]
            descend_(directions, found, [rate / len(found) for rate in lr], decay)
            return
        directions.shrink_(decay)
        for block, g in directions.sums([(seed, c / len(found)) for seed, c in found]):
            self._rule.advance(block, g, lr[block.group], self.state[block.tensor])

    def _follow_gradients(self) -> None:
        """Move the first-order blocks, and drop their gradients."""
        if not self._top:
            return
        for block in self._directions(self._top).blocks:
            p, group = block.tensor, self.param_groups[block.group]
            if p.grad is None:
                continue
            lr = group["lr"] * self.first_order_ratio
            block.part.mul_(1 - lr * group["weight_decay"])
            grad = p.grad.contiguous() if p.is_contiguous() else p.grad
            self._rule.advance(block, pieces(grad, self.block_size, p)[block.number], lr, self.state[p])
        for p in (p for i in self._top for p in self.param_groups[i]["params"]):
            p.grad = None

    def state_formula(self) -> int:
        """Bytes of state once every weight has moved: one number per weight for momentum, two for adam, else none."""
        trained = {id(p): p for group in self.param_groups for p in group["params"] if p.requires_grad}
        return sum(self._rule.state_bytes(p) for p in trained.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_saved_dtypes(self, state_dict)
