"""Sparse AdamW: AdamW on given entries of a model's weights, and on nothing else.

The second phase of Ansell, Ponti, Korhonen and Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL
2022, section 3.1; the mask may come from anywhere, as a file of `core/sparse.py`. For the entries theta_I of the mask:

    theta_I <- AdamW(theta_I),    g_I = dL/dtheta_I + l1 / N sign(theta_I - theta_I at the start)

N is the number of the model's parameters. Tensors that the file holds whole (a new head) train as a whole; all others
are frozen. The released code multiplies the gradient by the mask and leaves the rest to the optimizer: moments are as
large as the model there, and a weight decay moves every entry. Here moments are (k,), and decay stays in the mask. The
bound on the gradient's norm (`train.max_grad_norm`) is of the mask's gradient, as there; the L1 term is added after it,
there before.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from tunesmith.core.entryspace import INDICES, EntrySpace, change_, freeze, gathered
from tunesmith.core.gradspace import GradSpace, SpaceAdamW, State
from tunesmith.core.optimizer import decay_groups
from tunesmith.core.part import part
from tunesmith.core.projected import Beta, ProjectedAdamW
from tunesmith.core.sparse import SparseDelta
from tunesmith.errors import ModelError, TunesmithError

_ANCHOR = "anchor"


class GivenSpace(EntrySpace):
    """Entries that were given from outside."""

    def __init__(self, p: Tensor, indices: Tensor, bits: int) -> None:
        super().__init__(p, len(indices), bits)
        self.indices = indices

    def choose(self, p: nn.Parameter, state: State, name: str) -> Tensor:
        return self.indices


@part(
    paper="arXiv:2110.07560",
    refuses={
        "fsdp": "a mask has places in whole tensors, and a sharded one is not whole on any process",
        "adapters": "the weights under an adapter are frozen, so entries of theirs cannot train",
        "prompts": "the weights under a prompt are frozen, so entries of theirs cannot train",
    },
)
class SparseAdamW(SpaceAdamW):
    """AdamW on the entries of a mask.

    Args:
        params: Named parameters or groups of such; `SparseAdamW.groups(model, mask=...)` makes them.
        lr: Learning rate.
        weight_decay: Decoupled, on the entries of the mask alone.
        mask: A file of few entries (`core/sparse.py`), of which only the places matter; any base will do. None: every
            entry trains, which is plain AdamW.
        l1: Weight of the mean distance |theta - theta at the start| over all N parameters; 0.1 for the paper's language
            fine-tunings. It costs another number per entry.
        betas: Of Adam.
        eps: Added to the root of the second moment before the bias correction.
        bits: 8 keeps moments of 4096 numbers and more in 8 bits; needs bitsandbytes (`tunesmith[quant]`).
        per_layer: Update inside the backward pass and free each gradient at once.
    """

    refusals = staticmethod(ProjectedAdamW.refusals)

    def __init__(
        self,
        params: Any,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        *,
        mask: str | None = None,
        l1: NonNegativeFloat = 0.0,
        betas: tuple[Beta, Beta] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
        bits: Literal[32, 8] = 32,
        per_layer: bool = False,
    ) -> None:
        self._given: dict[nn.Parameter, Tensor] = {}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=bits,
            per_layer=per_layer,
            whole=mask is None,
            l1=l1,
            numbers=None,
        )
        if mask is not None:
            self._place(SparseDelta.load(mask), mask)
            if not per_layer:
                self._handles = [self._only_entries(p) for p in self._given]
        every = sum(p.numel() for p, *_ in self._places())
        for group in self.param_groups:
            group["numbers"] = group["numbers"] or every

    @classmethod
    def groups(
        cls, model: nn.Module, *, weight_decay: float = 0.0, mask: str | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """The tensors of the mask, then those that it holds whole; everything else in the model is frozen here.

        Raises:
            ModelError: the model lacks a tensor of the mask, has it in another shape, or does not train it.
            CheckpointError: the mask cannot be read.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        numbers = sum(p.numel() for p in model.parameters())
        if mask is None:
            parts = [(trained, True)]
        else:
            delta = SparseDelta.load(mask)
            tensors = model.state_dict(keep_vars=True)  # a tied tensor may be in the file under its other name
            names = {id(p): name for name, p in trained.items()}
            shapes = {name: entries.shape for name, entries in delta.items()}
            shapes |= {name: tuple(t.shape) for name, t in delta.whole.items()}
            for name, shape in shapes.items():
                found = tuple(tensors[name].shape) if name in tensors else "no such tensor"
                if found != shape or id(tensors[name]) not in names:
                    found = "a frozen one" if found == shape else found
                    raise ModelError(
                        f"the mask {mask} has entries of {name!r}, shape {shape}, and {type(model).__name__} has "
                        f"{found}; give the mask of this model, and let what it names train"
                    )
            parts = [
                ({n: tensors[n] for n in chosen}, whole) for chosen, whole in ((delta, False), (delta.whole, True))
            ]
            kept = {id(p) for chosen, _ in parts for p in chosen.values()}
            freeze(p for p in trained.values() if id(p) not in kept)
        made = []
        for chosen, whole in parts:
            known = {id(p): name for name, p in chosen.items()}
            for group in decay_groups(chosen.items(), model, weight_decay):
                named = [(known[id(p)], p) for p in group["params"]]
                made.append({**group, "params": named, "whole": whole, "numbers": numbers})
        return made

    def _place(self, delta: SparseDelta, mask: str) -> None:
        for p, index, place in self._places():
            group = self.param_groups[index]
            if group["whole"]:
                continue
            name = group["param_names"][place] if "param_names" in group else None
            if name not in delta or delta[name].shape != tuple(p.shape):
                raise TunesmithError(
                    f"{self._name(index, place)}, shape {tuple(p.shape)}, is not in the mask {mask}; give named "
                    f"parameters of its tensors, as `SparseAdamW.groups(model, mask={mask!r})` does"
                )
            self._given[p] = delta[name].indices

    def space(self, p: Tensor, group: dict[str, Any]) -> GradSpace:
        return GradSpace() if group["whole"] else GivenSpace(p, self._given[p], group["bits"])

    def _update(self, p: nn.Parameter, index: int, place: int) -> None:
        group = self.param_groups[index]
        if not group["l1"] or p.grad is None:
            super()._update(p, index, place)
            return
        state, places = self.state[p], None if group["whole"] else self._given[p].to(p.device)
        now = p.detach().clone() if places is None else gathered(p.detach(), places)
        if _ANCHOR in state:
            pull = (now - state[_ANCHOR]).sign().mul_(group["l1"] / group["numbers"])
            if places is None:
                p.grad.add_(pull)
            else:
                change_(p.grad, places, lambda values: values.add_(pull))
        super()._update(p, index, place)
        state.setdefault(_ANCHOR, now)  # after the first update, which finds an empty state and is not pulled

    def _only_entries(self, p: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        """Zero the rest of each gradient once it is there, so that a bound on its norm is one of the entries'."""
        owner = weakref.ref(self)

        def keep(p: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None and p.grad is not None:
                places = optimizer._given[p].to(p.device)
                values = gathered(p.grad, places)
                p.grad.zero_()
                change_(p.grad, places, lambda _: values)

        return p.register_post_accumulate_grad_hook(keep)

    def state_formula(self) -> int:
        """As of any optimizer with spaces; and one number per entry for `l1`."""
        anchors = 0
        for p, index, _ in self._places():
            group = self.param_groups[index]
            anchors += self.space(p, group).shape(p).numel() * p.element_size() * bool(group["l1"])
        return super().state_formula() + anchors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer with spaces.

        Raises:
            TunesmithError: the state is that of another mask.
        """
        super().load_state_dict(state_dict)
        for p, index, place in self._places():
            kept = self.state.get(p, {}).get(INDICES)
            if p in self._given and kept is not None and not torch.equal(kept.cpu(), self._given[p]):
                raise TunesmithError(
                    f"the saved state has other entries of {self._name(index, place)} than the mask; go on with the "
                    "mask that the run began with"
                )

    def masked(self) -> Mapping[nn.Parameter, Tensor]:
        """Each masked parameter with the places of its entries in the flattened tensor, (k,)."""
        return dict(self._given)
