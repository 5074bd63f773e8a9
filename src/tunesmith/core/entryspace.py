"""A few entries of a weight as the space of its moments: what sparse optimizers are made of.

For k entries of a weight W, at the places I of its flattened form,

    project(G) = G[I],    W[I] <- W[I] - size N,    W[I] <- W[I] - rate W[I]

and every other entry keeps its bits. Both moments are (k,), the places (k,) int32: 12 bytes per entry. An update
reads and writes k numbers of the weight; no dense update exists. The gradient itself is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tunesmith.core.entries import index_dtype
from tunesmith.core.gradspace import GradSpace, State, read_moment, write_moment
from tunesmith.core.modelmap import roles
from tunesmith.errors import TunesmithError

INDICES = "indices"
"""Key of a weight's state: the places of its entries in the flattened weight, (k,), ascending."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class EntrySpace(GradSpace):
    """k entries of one weight; a subclass says which in `choose`, and when anew in `due`.

    Args:
        p: The weight; only its shape is looked at.
        count: k.
        bits: Of the moments, as the group of the weight has them.

    Raises:
        TunesmithError: k is not between 1 and the entries that there are.
    """

    def __init__(self, p: Tensor, count: int, bits: int) -> None:
        if not 0 < count <= p.numel():
            raise TunesmithError(
                f"{count} entries of a weight of shape {tuple(p.shape)} were asked for; expected 1 to {p.numel()}"
            )
        self.full, self.count, self.bits = p.shape, count, bits

    def choose(self, p: nn.Parameter, state: State, name: str) -> Tensor:
        """The places of the entries, (k,), different, in any order."""
        raise TypeError(f"{type(self).__name__} does not say which entries it is made of")

    def due(self, state: State) -> bool:
        """Whether the entries are chosen anew before this step; `state["step"]` steps were made."""
        return False

    def shape(self, p: Tensor) -> torch.Size:
        return torch.Size((self.count,))

    def kept_bytes(self, p: Tensor) -> int:
        return self.count * index_dtype(p.numel()).itemsize

    def needs_refresh(self, state: State) -> bool:
        return INDICES not in state or self.due(state)

    def refresh(self, p: nn.Parameter, state: State, name: str) -> None:
        """Choose the entries. Moments of those that stay are kept, others are dropped, new ones start at 0.

        Raises:
            TunesmithError: not k places were chosen.
        """
        places = self.choose(p, state, name).to(p.device, index_dtype(p.numel())).sort().values
        if places.shape != (self.count,):
            raise TunesmithError(f"{self.count} entries of {name} were to be chosen, found {places.numel()}")
        if INDICES in state:
            for key in _MOMENTS:
                write_moment(state, key, carried(read_moment(state, key), state[INDICES], places), self.bits)
        state[INDICES] = places

    def project(self, grad: Tensor, state: State) -> Tensor:
        return gathered(grad, state[INDICES])

    def back(self, update: Tensor, state: State) -> Tensor:
        """The dense update, zero outside of the entries; `move` does without it."""
        flat = update.new_zeros(self.full.numel())
        return flat.index_copy_(0, state[INDICES].long(), update).view(self.full)

    def move(self, p: nn.Parameter, update: Tensor, state: State, size: float) -> None:
        change_(p, state[INDICES], lambda values: values.add_(update, alpha=-size))

    def decay(self, p: nn.Parameter, state: State, rate: float) -> None:
        change_(p, state[INDICES], lambda values: values.add_(values, alpha=-rate))


def gathered(tensor: Tensor, indices: Tensor) -> Tensor:
    """The entries of a tensor at some places of its flattened form, (k,)."""
    return tensor.reshape(-1).index_select(0, indices)


def change_(p: Tensor, indices: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change some entries of a tensor in place, calculated in float32 or wider and rounded once to its dtype.

    Args:
        p: Any layout; one that is not contiguous is copied for a moment.
        indices: (k,) places in the flattened tensor, different.
        change: What the entries become, from and to (k,).
    """
    flat, places = p.detach().reshape(-1), indices.long()
    values = flat[places]
    wide = torch.promote_types(values.dtype, torch.float32)
    flat[places] = change(values.to(wide)).to(values.dtype)
    if not p.is_contiguous():
        p.detach().copy_(flat.view(p.shape))


def carried(values: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Values that belong to the places `old`, moved to the places `new`; 0 where a place is new.

    Args:
        values: (k,), in the order of `old`.
        old: (k,) ascending, at least one.
        new: (n,) places.

    Returns:
        (n,), in the order of `new`.
    """
    at = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    return torch.where(old[at] == new, values[at], torch.zeros((), dtype=values.dtype, device=values.device))


def largest_places(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest scores of one tensor, exactly so many; of equal ones the first.

    Args:
        scores: Any shape, no NaN.
        count: 1 to all of them.

    Returns:
        (count,) int64, ascending, in the flattened tensor.
    """
    flat = scores.reshape(-1)
    least = flat.topk(count, sorted=False).values.min()
    above = (flat > least).nonzero()[:, 0]
    equal = (flat == least).nonzero()[: count - len(above), 0]
    return torch.cat([above, equal]).sort().values


# Around the entries ---------------------------------------------------------------------------------------------------


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Let no gradient of these be calculated."""
    for p in parameters:
        p.requires_grad_(False)


def task_head(model: nn.Module) -> set[str]:
    """Names of the parameters of a head that is made for a task, such as a classifier's, which begins at random.

    A language model has none: its output layer is pretrained.
    """
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        return set()
    base = getattr(model, getattr(model, "base_model_prefix", "") or "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(p) for p in base.parameters()}
        return {name for name, p in model.named_parameters() if id(p) not in inside}
    return {name for name, role in roles(model).items() if role.kind == "head"}
