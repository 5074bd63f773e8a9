"""One AdamW whose moments may live in another space than the weight.

A `GradSpace` is the hook: it maps a gradient to where the moments are kept, and an update back. The identity gives
plain AdamW, singular vectors give GaLore, a mask gives LIFT. For a gradient G at the k-th step of a weight W:

    R = project(G)
    M = b1 M + (1 - b1) R,   V = b2 V + (1 - b2) R^2,   N = M / (sqrt(V) + eps)
    W <- W - lr sqrt(1 - b2^k) / (1 - b1^k) back(N),    then W <- W - lr * weight_decay * W

so eps enters before the bias correction, as in the optimizer that transformers used to have and that GaLore is built
on. Everything a resumed run needs is in `state`: the step count of each weight, the moments, and what the space keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.optimizer import Closure, Optimizer, keep_saved_dtypes
from tunesmith.errors import TunesmithError

State = dict[str, Any]

BLOCK = 256
"""Numbers that share a scale in an 8-bit moment."""
SMALLEST_8BIT = 4096
"""Moments with fewer numbers stay in full precision, as in bitsandbytes."""


class GradSpace:
    """The identity, and the interface: moments as large as the weight, nothing kept beside them."""

    def shape(self, p: Tensor) -> torch.Size:
        """Of the projected gradient, and so of each moment."""
        return p.shape

    def kept_bytes(self, p: Tensor) -> int:
        """Bytes of what the space itself keeps in the weight's state."""
        return 0

    def needs_refresh(self, state: State) -> bool:
        """Whether this step begins with `refresh`; `state["step"]` is the number of steps made before."""
        return False

    def refresh(self, p: nn.Parameter, state: State, name: str) -> None:
        """Choose the space anew from `p` and `p.grad`; what is kept goes into `state` as tensors.

        The moments are in `state` too, under `exp_avg` and `exp_avg_sq` (`read_moment`, `write_moment`), for a method
        that carries them over.
        """

    def project(self, grad: Tensor, state: State) -> Tensor:
        """The gradient in this space."""
        return grad

    def back(self, update: Tensor, state: State) -> Tensor:
        """An update of this space as an update of the weight."""
        return update

    def move(self, p: nn.Parameter, update: Tensor, state: State, size: float) -> None:
        """W <- W - size back(update), in place; for spaces that need no dense update."""
        p.add_(self.back(update, state), alpha=-size)

    def decay(self, p: nn.Parameter, state: State, rate: float) -> None:
        """W <- W - rate W, in place; for spaces outside of which a weight must not move."""
        p.add_(p, alpha=-rate)


class SingularSpace(GradSpace):
    """The span of a gradient's leading singular vectors, on one side or on both.

    With G = U S V^T of shape (m, n): the left basis is P = U[:, :r], (m, r); the right one Q = V^T[:r], (r, n). The
    bases that exist are the sides that are used, whatever the shape of the projected gradient happens to be.

    Args:
        rank: r; at most min(m, n) is used.
        period: Steps of the weight between two refreshes.
        scale: Factor on what comes back.
        left: Whether P^T G is taken.
        right: Whether G Q^T is taken.
    """

    def __init__(self, rank: int, period: int, scale: float, *, left: bool, right: bool) -> None:
        self.rank, self.period, self.scale = rank, period, scale
        self.left, self.right = left, right

    def _rank(self, p: Tensor) -> int:
        return min(self.rank, *p.shape)

    def shape(self, p: Tensor) -> torch.Size:
        m, n = p.shape
        r = self._rank(p)
        return torch.Size((r if self.left else m, r if self.right else n))

    def kept_bytes(self, p: Tensor) -> int:
        m, n = p.shape
        return self._rank(p) * (m * self.left + n * self.right) * p.element_size()

    def needs_refresh(self, state: State) -> bool:
        return state["step"] % self.period == 0

    def refresh(self, p: nn.Parameter, state: State, name: str) -> None:
        """Take the bases from the gradient.

        Raises:
            TunesmithError: the gradient is zero or not finite; its basis would be wrong for a whole period.
        """
        assert p.grad is not None
        G = p.grad.float() if p.grad.dtype in (torch.float16, torch.bfloat16) else p.grad
        if not bool(G.isfinite().all()) or not bool(G.any()):
            found = "zero" if not bool(G.any()) else "not finite"
            raise TunesmithError(
                f"the gradient of {name}, shape {tuple(p.shape)}, is {found} at step {state['step']} of that weight, "
                "where its singular vectors are needed for the steps to come; look at the loss and the learning rate, "
                "or leave the weight out of the projected group"
            )
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        r = self._rank(p)
        if self.left:
            state["left"] = U[:, :r].to(p.dtype).clone(memory_format=torch.contiguous_format)
        if self.right:
            state["right"] = Vh[:r].to(p.dtype).clone(memory_format=torch.contiguous_format)

    def project(self, grad: Tensor, state: State) -> Tensor:
        low = state["left"].T @ grad if "left" in state else grad
        return low @ state["right"].T if "right" in state else low

    def back(self, update: Tensor, state: State) -> Tensor:
        sides = [state[side] for side in ("left", "right") if side in state]
        full = update.to(sides[0].dtype)
        full = state["left"] @ full if "left" in state else full
        full = full @ state["right"] if "right" in state else full
        return self.scale * full


class SpaceAdamW(Optimizer):
    """The AdamW above; a subclass chooses the space of each weight in `space`.

    Args:
        params: As for any torch optimizer; with names, errors name the tensor.
        lr: Learning rate.
        betas: b1 and b2.
        eps: Added to sqrt(V) before the bias correction.
        weight_decay: Decoupled, after the update.
        bits: Of the moments: 32, or 8 in blocks of 256 with bitsandbytes' dynamic code.
        per_layer: Update each weight as soon as its gradient is there, inside the backward pass, and free the
            gradient; `step()` then finds nothing left to do.
        more: Defaults of further keys of the parameter groups.

    Raises:
        TunesmithError: `bits=8` without bitsandbytes.
    """

    _handles: Sequence[torch.utils.hooks.RemovableHandle] = ()

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: int = 32,
        per_layer: bool = False,
        **more: Any,
    ) -> None:
        if bits == 8:
            _code(True)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits, **more}
        super().__init__(params, defaults)
        self._handles = [self._hook(p, *where) for p, *where in self._places()] if per_layer else []

    def space(self, p: Tensor, group: dict[str, Any]) -> GradSpace:
        """Where the moments of `p` live; depends on its shape and its group alone."""
        return GradSpace()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Args:
            closure: Computes the loss and its gradients, as for any torch optimizer.

        Raises:
            TunesmithError: a gradient from which a space must be chosen is zero or not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, group, place in self._places():
            self._update(p, group, place)
        return loss

    def _places(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                yield p, index, place

    def _update(self, p: nn.Parameter, index: int, place: int) -> None:
        if p.grad is None:
            return
        group, state = self.param_groups[index], self.state[p]
        space = self.space(p, group)
        if p.grad.is_sparse:
            raise TunesmithError(
                f"the gradient of {self._name(index, place)} is sparse, which {type(self).__name__} does not take; "
                "build the embedding with sparse=False"
            )
        if not state:
            state["step"] = 0
            for key in ("exp_avg", "exp_avg_sq"):
                zeros = torch.zeros(space.shape(p), dtype=_moment_dtype(p), device=p.device)
                write_moment(state, key, zeros, group["bits"])
        if space.needs_refresh(state):
            space.refresh(p, state, self._name(index, place))
        low = space.project(p.grad, state).to(_moment_dtype(p))
        state["step"] += 1
        (beta1, beta2), lr, k = group["betas"], group["lr"], state["step"]
        mean = read_moment(state, "exp_avg").mul_(beta1).add_(low, alpha=1 - beta1)
        square = read_moment(state, "exp_avg_sq").mul_(beta2).addcmul_(low, low, value=1 - beta2)
        update = mean / square.sqrt().add_(group["eps"])
        write_moment(state, "exp_avg", mean, group["bits"])
        write_moment(state, "exp_avg_sq", square, group["bits"])
        size = lr * (1 - beta2**k) ** 0.5 / (1 - beta1**k)
        space.move(p, update, state, size)
        if group["weight_decay"]:
            space.decay(p, state, lr * group["weight_decay"])

    def _name(self, index: int, place: int) -> str:
        names = self.param_groups[index].get("param_names")
        return repr(names[place]) if names else f"parameter {place} of group {index}"

    def _hook(self, p: nn.Parameter, index: int, place: int) -> torch.utils.hooks.RemovableHandle:
        # Weak: an optimizer that was dropped must not go on training the model.
        owner = weakref.ref(self)

        def update(p: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None:
                with torch.no_grad():
                    optimizer._update(p, index, place)  # type: ignore[arg-type]
                p.grad = None

        return p.register_post_accumulate_grad_hook(update)

    def detach(self) -> None:
        """Remove the hooks of `per_layer`."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def state_formula(self) -> int:
        """Bytes of state once every weight has been updated, from shapes and options alone; also on meta weights."""
        total = 0
        for p, index, _ in self._places():
            group = self.param_groups[index]
            space = self.space(p, group)
            total += space.kept_bytes(p) + 2 * _moment_bytes(space.shape(p).numel(), _moment_dtype(p), group["bits"])
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_saved_dtypes(self, state_dict)


# Moments --------------------------------------------------------------------------------------------------------------


def read_moment(state: State, key: str) -> Tensor:
    """The moment `exp_avg` or `exp_avg_sq` in full precision: the stored tensor itself, or what its codes stand for."""
    kept = state[key]
    if isinstance(kept, Tensor):
        return kept
    codes, scales = kept["codes"], kept["scales"]
    code = _code(key == "exp_avg").to(codes.device)
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, code, BLOCK, torch.float32)


def write_moment(state: State, key: str, value: Tensor, bits: int) -> None:
    """Keep a moment, in 8 bits if asked and if it is large enough."""
    if bits == 32 or value.numel() < SMALLEST_8BIT:
        state[key] = value
        return
    # A second moment has no sign, and the code without one is twice as fine.
    code = _code(key == "exp_avg").to(value.device)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(value.float(), code, BLOCK)
    state[key] = {"codes": codes, "scales": scales}


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _moment_bytes(numbers: int, dtype: torch.dtype, bits: int) -> int:
    if bits == 32 or numbers < SMALLEST_8BIT:
        return numbers * dtype.itemsize
    return numbers + 4 * -(-numbers // BLOCK)


@lru_cache
def _code(signed: bool) -> Tensor:
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError as error:
        raise TunesmithError(
            "8-bit moments need bitsandbytes, which is not installed; run `pip install 'tunesmith[quant]'`, or leave "
            "`bits` at 32"
        ) from error
    make: Callable[..., Tensor] = create_dynamic_map
    return make(signed=signed)
