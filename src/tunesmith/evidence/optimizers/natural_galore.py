"""Natural GaLore: the inverse by a dense solve, state by a count; a quadratic and fine-tuning against GaLore."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith import world
from tunesmith.core.gradspace import SingularSpace
from tunesmith.core.meters import state_bytes
from tunesmith.core.modelmap import block_linears
from tunesmith.core.projected import Projection
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_tune
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.galore import GaLore
from tunesmith.optimizers.natural_galore import FisherSpace, NaturalGaLore

QUADRATIC_RATES = (0.01, 0.03, 0.1)
RANK, STEPS, ROWS = 8, 150, 16
RATES = (1e-2, 3e-2, 1e-1)

CLAIM = Claim(
    "natural-galore",
    says="The inverse empirical Fisher matrix of the last low-rank gradients makes GaLore faster without additional "
    "memory: log-perplexity 3.53 against 3.56 (60M), 3.22 against 3.24 (130M), 2.93 against 2.95 (350M) and 2.80 "
    "against 2.90 (1.1B) on C4.",
    where="abstract; pre-training table",
    ran="The inverse against a dense solve, and byte counts. Then a quadratic in a 16 x 24 matrix of condition 1e4, "
    "300 steps from the same start at three learning rates: GaLore, and Natural GaLore with lambda of the order of "
    "|g|^2 (1 and 10), with the default 1e-3, and with a relative lambda of 1; ratios of final losses. Last, tiny-lm-s "
    "on `rotate`, a task that it was not pretrained on: rank 8 and a period of 50 on the linear layers of the blocks, "
    "everything else frozen, 150 steps on the same batches of 16; each side has three learning rates, chosen on 150 "
    "held-out items, and the loss on 150 others is reported.",
    not_held="With the released lambda of 1e-3 the language model is no better than GaLore's in the median: ahead in "
    "one seed (0.069 against 0.095), behind in two (0.561 against 0.020, 0.082 against 0.057). With lambda in the unit "
    "of |g|^2 it is ahead in all three (0.032, 0.011, 0.019). The quadratic says the same: the inverse helps, its "
    "absolute lambda does not. The paper's gains are at 60M parameters and more, with gradients clipped to norm 1, "
    "where the projected gradient of one weight may be nearer to 1e-3.",
)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator("natural-galore", seed), dtype=torch.float64)


def _projected(optimizer: NaturalGaLore, p: nn.Parameter, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The last natural gradient, (k,), and the projected gradients, (k, s), after as many steps without an update."""
    space, state = optimizer.space(p, optimizer.param_groups[0]), dict[str, Any](step=0)
    assert isinstance(space, FisherSpace)
    natural = torch.empty(0)
    for step, grad in enumerate(grads):
        p.grad, state["step"] = grad, step
        if space.needs_refresh(state):
            space.refresh(p, state, "W")
        natural = space.project(grad, state)
    low = [SingularSpace.project(space, grad, state).reshape(-1) for grad in grads]
    return natural.reshape(-1).double(), torch.stack(low[-20:], dim=1).double()


@CLAIM.exact
def the_inverse_is_that_of_a_dense_solve() -> list[Check]:
    """After 30 gradients, the natural one solves (lambda I + G G^T) n = g, G of the last 20, lambda = 1e-3."""
    checks = []
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 2e-2)):
        worst = 0.0
        cases: list[tuple[tuple[int, int], Projection]] = [((24, 16), "std"), ((16, 24), "std"), ((16, 24), "full")]
        for shape, proj_type in cases:
            p = nn.Parameter(torch.zeros(shape, dtype=dtype))
            grads = [(_random(*shape, seed=i) + 2 * _random(*shape, seed=99)).to(dtype) for i in range(30)]
            natural, G = _projected(NaturalGaLore([p], rank=8, proj_type=proj_type), p, grads)
            fisher = 1e-3 * torch.eye(len(G), dtype=torch.float64) + G @ G.T
            exact = torch.linalg.solve(fisher, G[:, -1])
            worst = max(worst, float((natural - exact).norm() / exact.norm()))
        checks.append(Check(f"relative error, {str(dtype).removeprefix('torch.')}", worst, "<=", bound))
    return checks


@CLAIM.exact
def one_gradient_is_scaled() -> Check:
    """At s = 1 the natural gradient is g / (lambda + |g|^2)."""
    p = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    natural, G = _projected(NaturalGaLore([p], rank=8, history=1, damping=0.5), p, [_random(24, 16, seed=0)])
    g = G[:, 0]
    return Check("relative error", float((natural * (0.5 + g @ g) / g - 1).abs().max()), "<=", 1e-9)


@CLAIM.exact
def without_a_history_it_is_galore() -> Check:
    """History off, 60 steps over three projections are GaLore's."""
    p, q = (nn.Parameter(_random(24, 16, seed=1)) for _ in range(2))
    ours, theirs = NaturalGaLore([p], rank=8, period=20, history=0), GaLore([q], rank=8, period=20)
    for step in range(60):
        p.grad = _random(24, 16, seed=step)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    return Check("largest difference", float((p - q).detach().abs().max()), "==", 0.0)


@CLAIM.exact
def the_history_is_additional_memory() -> list[Check]:
    """State of a 64 x 32 weight at rank 8: GaLore's 5120 bytes and 4 s k = 4 * 20 * 512 of the history."""
    sizes = []
    for make in (NaturalGaLore, GaLore):
        p = nn.Parameter(_random(64, 32, seed=0).float())
        optimizer = make([p], rank=8)
        p.grad = _random(64, 32, seed=1).float()
        optimizer.step()
        sizes.append(state_bytes(optimizer))
    return [
        Check("bytes beyond GaLore's", sizes[0] - sizes[1], "==", 4 * 20 * 8 * 64),
        Check("bytes, Natural GaLore", sizes[0], "==", 46080),
    ]


# Comparison -----------------------------------------------------------------------------------------------------------


def _quadratic(seed: int, lr: float, damping: float | None, *, relative: bool = False) -> float:
    """Final loss of tr((W - W*)^T A (W - W*)) / 2 with eigenvalues of A from 1 to 1e-4; without damping GaLore's."""
    Q = torch.linalg.qr(_random(16, 16, seed=1000 + seed)).Q
    A = (Q * torch.logspace(0, -4, 16, dtype=torch.float64)) @ Q.T
    goal, W = _random(16, 24, seed=2000 + seed), nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    options: dict[str, Any] = {"lr": lr, "rank": 8, "period": 50, "scale": 1.0}
    more: dict[str, Any] = {} if damping is None else {"damping": damping, "relative": relative}
    optimizer = GaLore([W], **options) if damping is None else NaturalGaLore([W], **options, **more)
    for _ in range(300):
        W.grad = A @ (W.detach() - goal)
        optimizer.step()
    apart = W.detach() - goal
    return float((apart * (A @ apart)).sum() / 2)


@lru_cache
def _family() -> world.Family:
    return world.get("rotate")


def _tuned(seed: int, damping: float | None, *, relative: bool = False) -> tuple[float, float]:
    """Held-out loss at the best of the rates, and that rate."""
    given = kit_tune.train_batches(_family(), STEPS, ROWS, seed)
    choose, report = kit_tune.heldout_batches(_family(), 150)
    runs = []
    for lr in RATES:
        model = kit_tune.language_model().requires_grad_(False)
        for name in block_linears(model):
            model.get_submodule(name).weight.requires_grad_(True)
        options: dict[str, Any] = {"lr": lr, "rank": RANK, "period": 50}
        more: dict[str, Any] = {} if damping is None else {"damping": damping, "relative": relative}
        kind = GaLore if damping is None else NaturalGaLore
        kit_tune.tune(model, kind(kind.groups(model), **options, **more), given)
        runs.append((kit_tune.loss(model, choose), kit_tune.loss(model, report), lr))
    _, reported, rate = min(runs)
    return reported, rate


_KINDS: dict[str, dict[str, Any]] = {
    "galore": {"damping": None},
    "1": {"damping": 1.0},
    "10": {"damping": 10.0},
    "default": {"damping": 1e-3},
    "relative": {"damping": 1.0, "relative": True},
}


@CLAIM.comparison
def against_galore(seed: int) -> dict[str, float]:
    figures = {}
    for kind, options in _KINDS.items():
        for lr in QUADRATIC_RATES:
            figures[f"quadratic_{kind}_{lr}"] = _quadratic(seed, lr, **options)
        if kind not in ("1", "10"):
            figures[f"lm_{kind}"], figures[f"lm_{kind}_lr"] = _tuned(seed, **options)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    def ratios(kind: str) -> list[float]:
        return [
            figures.median(f"quadratic_{kind}_{lr}") / figures.median(f"quadratic_galore_{lr}")
            for lr in QUADRATIC_RATES
        ]

    name = "quadratic, final loss / GaLore's"
    return [
        Check(f"{name}, lambda 1, worst of three rates", max(ratios("1")), "<=", 1.0),
        Check(f"{name}, lambda 10, worst of three rates", max(ratios("10")), "<=", 1.0),
        Check(f"{name}, default lambda 1e-3, best of three rates", min(ratios("default")), ">=", 10.0),
        Check(
            "held-out loss, default lambda - GaLore, nats per token",
            figures.median("lm_default") - figures.median("lm_galore"),
            "<=",
            0.0,
        ),
        Check(
            "held-out loss, relative lambda - GaLore, nats per token",
            figures.median("lm_relative") - figures.median("lm_galore"),
            "<=",
            0.0,
        ),
    ]
