"""ZO personalisation: train one token by forward passes, in the directions that it has been moving in.

Seo, Jeong, Lee and Chun, "Efficient Personalization of Quantized Diffusion Model without Backpropagation" (ZOODiP),
CVPR 2025.

    p_i = (L(e + mu z_i) - L(e)) / mu,   z_i ~ N(0, I), i = 1..n
    g = sum_i p_i z_i / (n sqrt((d' + n - 1) / n)),   g <- g - (g V^T) V,   e <- e - lr Adam(g)
    every tau steps: the last tau tokens are standardised, their principal components with explained variances found;
    with i the first index (from 0) at which the cumulative share exceeds 1 - nu, V = components i+1, i+2, ...

The root makes g about as long as the gradient, instead of sqrt(d / n) times longer; d' is d less the rows of V. Of the
tau components the last one has no variance, since the mean is taken out, and its direction is arbitrary: it is left
out of V. V is found in standardised coordinates and applied to plain ones, as in the released code; where coordinates
move by different amounts the two are not the same directions. tau is meant to be far below d: of a token of 128
numbers, tau = 128 removes all but about ten directions.

Where we differ from the released code: e comes back bit for bit after a perturbation, and not by subtracting what was
added; the loss returned is that of e, not of the last perturbation; V and the tokens are float32, where it keeps half
precision, in which V is not orthonormal; several tensors may train, as one vector; a loss that is not finite is left
out and counted; random numbers are addressed by (seed, step), and the user's are left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.directions import Directions, Noise
from tunesmith.core.optimizer import Closure, Optimizer
from tunesmith.core.part import part
from tunesmith.core.seeds import seed_of
from tunesmith.errors import TunesmithError

_RUN, LIMIT = "run", 2**18  # numbers that may train: a soft prompt of 64 tokens of width 4096
Share = Annotated[float, Field(ge=0, lt=1)]


@part(
    paper="arXiv:2503.14868",
    tags=("forward-only",),
    refuses={
        "fsdp": "a tensor that is sharded would get the same direction on the shard of every process",
        "schedules": "the trajectory is of all that trains, and has a gap where a schedule freezes some of it",
    },
)
class ZOPersonalization(Optimizer):
    """Adam on a cleaned zeroth-order estimate, for a token's vector or a soft prompt.

    The model must be in evaluation mode, and the closure the same function n + 1 times: noise and timesteps of a
    diffusion model are drawn outside of it. Keep what trains in float32, also in a half-precision model: in bf16 a
    perturbation of 1e-3 nearly rounds away.

    Args:
        params: Parameters or groups; what requires no gradient is left alone. At most 2^18 numbers.
        lr: Learning rate of Adam.
        weight_decay: Decoupled; the paper has none.
        mu: Size of the perturbation.
        samples: n, directions per step; a step is n + 1 forward passes.
        subspace: Remove the directions in which the token has hardly moved; False keeps no history.
        period: tau, steps between two analyses and tokens in the history; at most the numbers that train.
        nu: Share of the variance in the directions that are removed.
        betas: Of Adam.
        eps: Added to the root of Adam's second moment.
        seed: Of all directions of the run.
        noise: Draw on the weights' own `device`, or on the `cpu`, the same numbers everywhere.
    """

    forward_only: ClassVar[bool] = True
    brisk: ClassVar[Mapping[str, object]] = {"period": 3}
    _found: list[tuple[int, float]] | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        mu: PositiveFloat = 1e-3,
        samples: PositiveInt = 2,
        subspace: bool = True,
        period: Annotated[int, Field(ge=2)] = 128,
        nu: Share = 1e-3,
        betas: tuple[Share, Share] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-3,
        seed: int = 0,
        noise: Noise = "device",
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.mu, self.samples, self.betas, self.eps = mu, samples, betas, eps
        self.subspace, self.period, self.nu, self.noise = subspace, period, nu, noise
        # Everything under one key that is no parameter: torch would load the state of one in that one's dtype.
        self.state[_RUN] = {"step": 0, "skipped": 0, "seed": seed}
        self._numbers()

    def _trained(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Group and tensor of everything that trains, by the rule of `Directions`: what shares memory counts once."""
        seen: set[int] = set()
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and (p.is_meta or p.data_ptr() not in seen):
                    seen.add(p.data_ptr())
                    yield group, p

    def _numbers(self) -> None:
        count = sum(p.numel() for _, p in self._trained())
        if count > LIMIT:
            raise TunesmithError(
                f"zo-personalization: {count:,} numbers train; it is for a token's vector or a soft prompt, of at most "
                f"{LIMIT:,}: in more, the estimate is noise, and it keeps {self.period} values of each. Use mezo."
            )
        if self.subspace and count < self.period:
            raise TunesmithError(
                f"zo-personalization: a history of {self.period} tokens has at most as many principal directions as a "
                f"token has numbers, and {count} train; set `period` to at most {count}, or `subspace` to False"
            )

    @property
    def skipped(self) -> int:
        """Estimates left out because a loss was not finite."""
        return self.state[_RUN]["skipped"]

    @property
    def basis(self) -> Tensor | None:
        """V, (r, d) float32 with orthonormal rows: the directions that are removed. None before the first analysis."""
        return self.state[_RUN].get("basis")

    @torch.no_grad()
    def estimate(self, closure: Closure) -> Tensor:
        """Measure the slopes along `samples` directions; the loss, (). The parameters stay the same, bit for bit.

        Raises:
            TunesmithError: too many numbers train, or fewer than the history is long.
        """
        self._numbers()
        run, directions = self.state[_RUN], Directions(self.param_groups, noise=self.noise)
        kept = [(p, p.clone()) for _, p in self._trained()]
        here, found = closure().detach(), []
        for sample in range(self.samples):
            seed = seed_of(run["seed"], "zo-personalization", run["step"], sample)
            directions.add_(seed, self.mu)
            try:
                there = closure()
            finally:
                for p, was in kept:
                    p.copy_(was)
            slope = float(torch.tensor((float(there) - float(here)) / self.mu, dtype=torch.float32))
            if math.isfinite(slope):
                found.append((seed, slope))
                continue
            run["skipped"] += 1
            warnings.warn(
                f"zo-personalization: step {run['step']}: the losses {float(here):g} and {float(there):g} give no "
                f"slope; the estimate is left out ({run['skipped']} so far). Lower `lr` if it goes on.",
                stacklevel=3,
            )
        self._found = found
        return here

    @torch.no_grad()
    def gradient(self, found: list[tuple[int, float]]) -> Tensor:
        """(d,) float32: the scaled and cleaned estimate of (seed, slope) pairs, all tensors end to end."""
        trained, groups = {id(p) for _, p in self._trained()}, []
        for group in self.param_groups:
            sums = [torch.zeros_like(p, dtype=torch.float32, requires_grad=id(p) in trained) for p in group["params"]]
            groups.append({"params": sums})
        found_in = [total.detach() for group in groups for total in group["params"] if total.requires_grad]
        directions = Directions(groups, noise=self.noise)
        for seed, slope in found:
            directions.add_(seed, slope)
        g = torch.cat([total.flatten().to(found_in[0].device) for total in found_in])
        n, still = len(found), g.new_zeros(0, g.numel()) if self.basis is None else self.basis.to(g)
        g /= n * math.sqrt((g.numel() - len(still) + n - 1) / n)
        g -= (still @ g) @ still
        return g

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Apply the last estimate; with a closure, make it first.

        Args:
            closure: Returns the loss, (); it is called `samples` + 1 times and needs no backward pass.

        Raises:
            TunesmithError: there is no estimate to apply, or other tensors train than before.
        """
        loss = None if closure is None else self.estimate(closure)
        if self._found is None:
            raise TunesmithError("zo-personalization: no estimate to apply; call estimate(closure) or step(closure)")
        (found, self._found), run = (self._found, None), self.state[_RUN]
        run["step"] += 1
        if not found:
            return loss
        g = self.gradient(found)
        self._prepare(run, g)
        run["moved"] += 1
        (beta1, beta2), moved = self.betas, run["moved"]
        m = run["exp_avg"].lerp_(g, 1 - beta1) / (1 - beta1**moved)
        v = run["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2) / (1 - beta2**moved)
        update, values = (m / (v.sqrt() + self.eps)).split([p.numel() for _, p in self._trained()]), []
        for (group, p), move in zip(self._trained(), update, strict=True):
            value = p.to(torch.promote_types(p.dtype, torch.float32)) * (1 - group["lr"] * group["weight_decay"])
            p.copy_(value - group["lr"] * move.view(p.shape).to(p.device))
            values.append(p.flatten().float().to(g.device))
        if self.subspace:
            run["history"][(moved - 1) % self.period] = torch.cat(values)
            if moved % self.period == 0:
                run["basis"] = still_directions(run["history"], self.nu)
        return loss

    def _prepare(self, run: dict[str, Any], g: Tensor) -> None:
        if "exp_avg" not in run:
            history = g.new_zeros(self.subspace * self.period, g.numel())
            run |= {"moved": 0, "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g), "history": history}
        what = Directions(self.param_groups).fingerprint()["digest"]
        if run.setdefault("what", what) != what:
            raise TunesmithError(
                f"zo-personalization: other numbers train than before ({g.numel():,} now, {run['exp_avg'].numel():,} "
                "then), and a trajectory is of all: make a new optimizer"
            )
        if len(run["history"]) != self.subspace * self.period:
            raise TunesmithError("zo-personalization: the saved run had another `period` or `subspace`; give its own")
        for name in run.keys() & {"exp_avg", "exp_avg_sq", "history", "basis"}:
            run[name] = run[name].to(g.device)  # a loaded state lies on the cpu

    def state_formula(self) -> int:
        """Bytes of state: Adam's moments, the history, and V once it is there."""
        rows = 2 + self.subspace * self.period + (0 if self.basis is None else len(self.basis))
        return 4 * rows * sum(p.numel() for _, p in self._trained())


def still_directions(history: Tensor, nu: float) -> Tensor:
    """(r, d) float32, orthonormal rows: in which of the tau tokens' directions they hardly move (Algorithm 1).

    Args:
        history: (tau, d) tokens, d >= tau.
        nu: The share of the standardised tokens' variance that is outside of the directions kept.
    """
    tokens = history.double()
    spread = tokens.std(0, correction=0)  # of equal float32 numbers exactly zero in float64
    tokens = (tokens - tokens.mean(0)) / spread.where(spread > 0, 1.0)
    _, sizes, components = torch.linalg.svd(tokens, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum().clamp_min(1e-300)
    first = int((share <= 1 - nu).sum())
    return components[first + 1 : len(sizes) - 1].float().contiguous()
