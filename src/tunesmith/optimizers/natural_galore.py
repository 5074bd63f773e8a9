"""Natural GaLore: GaLore whose low-rank gradient passes through an inverse empirical Fisher matrix before Adam.

Das, "Natural GaLore: Accelerating GaLore for Memory-Efficient LLM Training and Fine-Tuning", 2024, section 3. With g
the projected gradient of one weight as a vector of k numbers, and G = [g_1 .. g_s] (k, s) the last s of them, the
present one among them:

    F = lambda I + G G^T,    n = F^-1 g = g / lambda - G (I + G^T G / lambda)^-1 G^T g / lambda^2     (Woodbury)

and n takes the place of g in Adam. Since g is a column of G, say the j-th, this is n = G (lambda I + G^T G)^-1 e_j:
the same vector without the difference of two nearly equal ones, which in float32 at lambda = 1e-3 costs the released
formula three digits and more. Inner products and the (s, s) system are in float64.

G costs 4 s k bytes per weight beside GaLore's state: at s = 20, ten times its two moments. "Without additional memory"
in the abstract is so only where s k is small against the weights, and `state_formula` counts it.

lambda is absolute, and decides what the method is. Far above |g|^2, n is g / lambda, and Adam, which has no scale,
makes it GaLore. Far below, a direction counts by how rare it is among the last s gradients, and the common direction of
descent nearly vanishes: at the released 1e-3 a real danger (our claim has figures). `relative=True` gives lambda the
unit mean |g_i|^2. The paper's Fisher matrix divides by s, its Woodbury form and released code do not, nor do we: to
divide is to multiply lambda by s.

Where we differ from the released code: the history is emptied when the projection changes, or rotated into the new
bases (`on_refresh`), where theirs mixes coordinates of different bases; the projection is GaLore's (theirs is its
`full`, r x r); a gradient that is not finite is an error that says so, not a failed factorisation. Their "online" mode,
which trains the bases by reconstruction, is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.gradspace import SingularSpace, State
from tunesmith.core.part import part
from tunesmith.core.projected import Beta, ProjectedAdamW, Projection
from tunesmith.errors import TunesmithError

Refresh = Literal["clear", "rotate", "keep"]
_COLUMNS = 2**18
"""Numbers of each gradient that are in float64 at a time: 42 MB at s = 20."""


class FisherSpace(SingularSpace):
    """GaLore's space, whose gradients are turned by the inverse empirical Fisher matrix of the last ones.

    In `state`: `history`, (s, k), one gradient to a row, the oldest replaced first; rows not yet used are zero, which
    is what a gradient that was never seen adds to G G^T.

    Args:
        history: s, at least 1.
        damping: lambda.
        relative: Whether lambda is `damping` times the mean of |g_i|^2 over the history.
        on_refresh: What becomes of the history when the bases change.
        where: As for `SingularSpace`.
    """

    def __init__(self, history: int, damping: float, *, relative: bool, on_refresh: Refresh, **where: Any) -> None:
        super().__init__(**where)
        self.history, self.damping, self.relative, self.on_refresh = history, damping, relative, on_refresh

    def kept_bytes(self, p: Tensor) -> int:
        numbers = self.history * self.shape(p).numel()
        return super().kept_bytes(p) + numbers * torch.promote_types(p.dtype, torch.float32).itemsize

    def refresh(self, p: nn.Parameter, state: State, name: str) -> None:
        old = {side: state[side] for side in ("left", "right") if side in state}
        super().refresh(p, state, name)
        if "history" not in state:
            kept = torch.promote_types(p.dtype, torch.float32)
            state["history"] = torch.zeros(self.history, self.shape(p).numel(), dtype=kept, device=p.device)
        elif self.on_refresh == "clear":
            state["history"].zero_()
        elif self.on_refresh == "rotate":
            rows = state["history"].view(self.history, *self.shape(p))
            if "left" in old:  # R' = P'^T (P R), and R' = (R Q) Q'^T
                rows = (state["left"].T @ old["left"]).to(rows.dtype) @ rows
            if "right" in old:
                rows = rows @ (old["right"] @ state["right"].T).to(rows.dtype)
            state["history"] = rows.reshape(state["history"].shape)

    def project(self, grad: Tensor, state: State) -> Tensor:
        """The natural gradient in this space; the gradient joins the history.

        Raises:
            TunesmithError: the gradient is not finite.
        """
        low, history = super().project(grad, state), state["history"]
        newest = state["step"] % self.history
        history[newest] = low.reshape(-1)
        products = torch.zeros(self.history, self.history, dtype=torch.float64, device=history.device)
        for columns in _pieces(history):
            products += columns @ columns.T
        factor, failed = torch.linalg.cholesky_ex(products + self.damping_of(products) * _eye(products))
        if not bool((failed == 0) & factor.isfinite().all()):
            size = float(low.float().norm())
            raise TunesmithError(
                f"the empirical Fisher matrix of a weight of shape {tuple(grad.shape)} has no inverse at step "
                f"{state['step']} of that weight: its projected gradient has the norm {size:g}. Look at the loss and "
                "the learning rate, bound the gradient's norm, or raise `damping`"
            )
        shares = torch.cholesky_solve(_eye(products)[:, newest, None], factor)[:, 0]
        natural = torch.cat([shares @ columns for columns in _pieces(history)])
        return natural.to(history.dtype).view(low.shape)

    def damping_of(self, products: Tensor) -> Tensor:
        """lambda, (), from the inner products of the history, (s, s)."""
        if not self.relative:
            return products.new_tensor(self.damping)
        squares = products.diagonal()
        mean = squares.sum() / (squares > 0).sum().clamp_min(1)
        return self.damping * mean.clamp_min(torch.finfo(torch.float32).tiny)


def _pieces(history: Tensor) -> Iterator[Tensor]:
    return (columns.double() for columns in history.split(_COLUMNS, dim=1))


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


@part(
    paper="arXiv:2410.16029",
    refuses={
        "fsdp": "the singular vectors are of a whole matrix, and a sharded one is not whole on any process",
        "adapters": "the weights under an adapter are frozen, so there is no gradient of theirs to project",
        "prompts": "the weights under a prompt are frozen, so there is no gradient of theirs to project",
    },
)
class NaturalGaLore(ProjectedAdamW):
    """GaLore with the inverse empirical Fisher matrix of the last projected gradients.

    A group whose `rank` is None gets plain AdamW, and so does every tensor that is not 2-D; `groups` gives the weights
    of the linear layers in the blocks a rank and everything else none. All options but `per_layer` can be set per
    group.

    Args:
        params: Parameters or groups; `NaturalGaLore.groups(model)` makes them.
        lr: Learning rate; that of the projected weights is in effect `lr * scale`.
        weight_decay: Decoupled, after the update.
        rank: r; at most the smaller side of a weight is used. 4 and 8 in the paper's fine-tuning.
        period: T, steps of a weight between two projections: 200 in pre-training, 500 in fine-tuning.
        scale: alpha; 0.25 in pre-training, 4 in fine-tuning.
        proj_type: As for GaLore: `std` is the paper's, on one side; `full`, on both, is the released code's.
        history: s, projected gradients that are kept, at 4 bytes per number; 0 is GaLore.
        damping: lambda, which is to be compared with the squared norm of a projected gradient; see `damping_ratios`.
        relative: Measure lambda in the mean squared norm of the history, so that 1 is a balanced choice anywhere.
        on_refresh: At a new projection `clear` empties the history, `rotate` turns it into the new bases, `keep`
            leaves its numbers as they are, as in the released code.
        betas: Of Adam.
        eps: Added to the root of the second moment before the bias correction.
        bits: 8 keeps moments of 4096 numbers and more in 8 bits; needs bitsandbytes (`tunesmith[quant]`).
        per_layer: Update inside the backward pass and free each gradient at once.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: PositiveInt = 128,
        period: PositiveInt = 200,
        scale: PositiveFloat = 0.25,
        proj_type: Projection = "std",
        history: NonNegativeInt = 20,
        damping: PositiveFloat = 1e-3,
        relative: bool = False,
        on_refresh: Refresh = "clear",
        betas: tuple[Beta, Beta] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-6,
        bits: Literal[32, 8] = 32,
        per_layer: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=bits,
            per_layer=per_layer,
            rank=rank,
            period=period,
            scale=scale,
            proj_type=proj_type,
            history=history,
            damping=damping,
            relative=relative,
            on_refresh=on_refresh,
        )
        self._tell_of_clipped_ranks()

    def projected_space(self, group: dict[str, Any], *, left: bool, right: bool) -> SingularSpace:
        where = {key: group[key] for key in ("rank", "period", "scale")} | {"left": left, "right": right}
        if not group["history"]:
            return SingularSpace(**where)
        fisher = {key: group[key] for key in ("history", "damping", "relative", "on_refresh")}
        return FisherSpace(**fisher, **where)

    @torch.no_grad()
    def damping_ratios(self) -> list[float]:
        """lambda over the newest |g|^2 of each projected weight: far above 1 the method is GaLore, far below it stalls.

        Empty before the first step, and without a history. A gradient of zero gives infinity.
        """
        found = []
        for p, index, _ in self._places():
            state, space = self.state.get(p, {}), self.space(p, self.param_groups[index])
            if isinstance(space, FisherSpace) and "history" in state:
                squares = state["history"].double().square().sum(1)
                newest = squares[(state["step"] - 1) % space.history]
                found.append(float(space.damping_of(squares.diag()) / newest))
        return found
