"""SaRA: the smallest weights of a model, which it hardly needs, train; those that have grown stay, the rest goes on.

Hu, Zhang, Yi, Huang, Wang and Ma, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
Adaptation", ICLR 2025.

    M = 1[|W0| < theta],   v = W0[M] trains,   W' = W0 with v in the places of M,   dL/dv = (dL/dW')[M]
    after P steps:  M' = 1[|W'| < theta],  entries of M outside of M' keep their value,  the optimizer begins anew

v holds weights, not changes: weight decay (1e-2 in the paper) pulls it to 0, and the start is the base model exactly.
Biases and norms are left out, though the zeros of their biases are below every theta. theta is given, 2e-3 in the paper
for Stable Diffusion 1.5, or follows from the share of the smallest weights over all layers together: the paper finds 10
to 20 % to be without effect. The paper's learning rate is 1e-3 exp(-350 theta) (`paper_rate`). Its low-rank term is the
regulariser `nuclear-norm`.

The trained vector keeps its length after P steps, so that optimizers, processes and files need not know: frozen entries
have no gradient and come back bit for bit after each step. Adam's state stays 8 bytes for each entry of M, where the
paper's falls to 8 for each of M'; to hold the frozen ones takes 1 byte for each of M and 4 for each of them.

Where we differ from released code: it puts |v| in the place of v, at the start and at step P, which turns the sign of
every small negative weight; it adds the gradient of its low-rank term to tensors that no one reads, so that the term
has no effect at all (10 steps with and without it end in the same bits); it makes no step after the P-th; and it stops
with an AttributeError unless P is given. An adapter below on the same layer loses what it does in the places of M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from tunesmith.core.adapter import Statistics, Step
from tunesmith.core.entries import index_dtype
from tunesmith.core.layer import LayerSpec, kind_of, read_weight
from tunesmith.core.modelmap import roles
from tunesmith.core.part import part
from tunesmith.core.rebuilt import RebuiltAdapter
from tunesmith.errors import CheckpointError, ModelError, RecipeError, TunesmithError

Share = Annotated[float, Field(gt=0, le=1)]
When = Annotated[int, Field(strict=True, gt=0)] | Annotated[float, Field(gt=0, lt=1)]


class _Threshold(nn.Module):
    """theta of all layers of an adapter: nothing that trains or is saved."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value


@part(
    paper="arXiv:2409.06633",
    tags=("mergeable", "sparse"),
    refuses={"fsdp": "entries are held one by one by their place, and a sharded vector has other places"},
)
class SaRA(RebuiltAdapter):
    """The weights of a layer that are smaller than a threshold, as one vector that trains.

    Args:
        layer: A linear or convolution layer, also quantised, or an embedding.
        threshold: theta. A weight trains if it is smaller, whatever its sign.
        density: Instead, the share of the smallest weights of all layers together, ties included; 0.1 if none is given.
        reselect: P, in steps, or as a share of the run below 1; None keeps the first choice to the end.

    Attributes:
        indices: (k,) buffer, ascending places in the flattened canonical weight.
        values: (k,) parameter, the weights there; float32, float64 for such a base.
        frozen: (k,) bool, which of them have grown and stay; None before P.
        at_step: The number of the optimizer step, for regularisers.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    brisk: ClassVar[Mapping[str, object]] = {"density": 0.2, "reselect": 3}
    indices: Tensor
    frozen: Tensor | None
    kept: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        threshold: PositiveFloat | None = None,
        density: Share | None = None,
        reselect: When | None = 0.5,
    ) -> None:
        if threshold is not None and density is not None:
            raise RecipeError(f"sara: threshold={threshold:g} and density={density:g} are both given: give one")
        super().__init__(layer)
        self.threshold, self.reselect, self.at_step = math.nan, reselect, 0
        self.register_buffer("indices", torch.empty(0, dtype=torch.int32, device=layer.device))
        self.values = nn.Parameter(torch.empty(0, device=layer.device))
        self.register_buffer("frozen", None, persistent=False)
        self.register_buffer("kept", None, persistent=False)

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every linear and convolution layer but an output head; name embeddings in `target_modules`."""
        known, names = roles(model), dict(model.named_modules())
        wrapped = tuple(f"{name}." for name, module in names.items() if hasattr(module, "base_layer"))
        found = []
        for name, module in names.items():
            role = known.get(f"{name}.weight")
            outermost = name.endswith(".base_layer") or not name.startswith(wrapped)
            if outermost and kind_of(module) in ("linear", "conv") and role is not None and role.kind != "head":
                found.append(name.removesuffix(".base_layer"))
        return found

    # The choice -----------------------------------------------------------------------------------------------------

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module:
        if options["threshold"] is not None:
            return _Threshold(options["threshold"])
        return _Threshold(threshold_of(lambda: (_original(model, n) for n in layers), options["density"] or 0.1))

    @torch.no_grad()
    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        """Take the small weights; ModelError if there is none."""
        assert isinstance(self.shared, _Threshold)
        self.threshold = self.shared.value
        flat = W.detach().reshape(-1)
        # In bfloat16, theta itself would be rounded.
        places = (flat.float().abs() < self.threshold).nonzero()[:, 0]
        if not len(places):
            raise ModelError(
                f"sara: none of the {flat.numel()} weights of {self.layer.name!r} is below {self.threshold:.3g}, and "
                f"the smallest is {float(flat.float().abs().min()):.3g}; raise `threshold` or `density`, or leave the "
                "layer out by `exclude_modules`"
            )
        self.indices = places.to(index_dtype(flat.numel()))
        self.values = nn.Parameter(flat[places].to(torch.promote_types(W.dtype, torch.float32)))

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            made.at_step = step.number
            made._due(step)  # what is wrong with it is said before anything has trained

    @classmethod
    @torch.no_grad()
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            if made.frozen is not None and made.kept is not None:
                made.values[made.frozen] = made.kept
            if step.number + 1 == made._due(step):
                if step.optimizer is None:
                    raise TunesmithError(
                        "sara begins the optimizer's state anew: write `with tunesmith.step(model, n, total=STEPS, "
                        "optimizer=optimizer):`"
                    )
                step.optimizer.state.pop(made.values, None)
                made._freeze(made.values.float().abs() >= made.threshold)

    def _due(self, step: Step) -> int | None:
        """P in steps, None if never; RecipeError if it is not within the run."""
        if isinstance(self.reselect, float):
            return int(self.reselect * step.needs_total("sara"))
        if self.reselect is not None and step.total is not None and self.reselect >= step.total:
            raise RecipeError(
                f"sara: reselect={self.reselect} is not within the run's {step.total} steps; give fewer steps, a share "
                "of the run such as 0.5, or None"
            )
        return self.reselect

    def _freeze(self, frozen: Tensor) -> None:
        self.frozen, self.kept = frozen, self.values.detach()[frozen]

    # The layer ------------------------------------------------------------------------------------------------------

    def weight(self, W: Tensor) -> Tensor:
        v: Tensor = self.values
        if self.frozen is not None and self.kept is not None:
            v = v.masked_scatter(self.frozen, self.kept)  # no gradient there
        return W.reshape(-1).index_copy(0, self.indices.long(), v.to(W.dtype)).view(W.shape)

    def trained_matrix(self) -> Tensor:
        """W' * M (M' after P steps) in the canonical shape, differentiable: what `nuclear-norm` is taken of."""
        v = self.values if self.frozen is None else self.values.masked_fill(self.frozen, 0.0)
        dense = v.new_zeros(torch.Size(self.layer.shape).numel())
        return dense.index_copy(0, self.indices.long(), v).view(self.layer.shape)

    def sparse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.indices, self.values.detach() - W.detach().reshape(-1)[self.indices].to(self.values.dtype)

    # Between sessions -----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        indices = state_dict.get(f"{prefix}indices")
        if indices is not None:
            same = float(torch.isin(indices.to(self.indices.device), self.indices).float().mean())
            if same < 0.5:
                raise CheckpointError(
                    f"SaRA of {self.layer.name!r} holds {len(indices)} weights, of which {same:.0%} are among the "
                    "smallest of this base: load the base that it was trained on"
                )
            if len(indices) != len(self.indices):  # the base is in another dtype: some are on the other side of theta
                self.indices = self.indices.new_zeros(len(indices))
                self.values.data = self.values.data.new_zeros(len(indices))
            self.frozen, self.kept = None, None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.frozen is None else {"frozen": self.frozen}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self._freeze(state["frozen"].to(self.values.device))


def threshold_of(weights: Callable[[], Iterable[Tensor]], share: float) -> float:
    """The least theta for which |w| < theta holds for the `share` of smallest numbers, one at least.

    Exact, in two passes that look at a tensor at a time: the bits of positive float32 numbers are ordered as they are.
    `weights` gives the tensors, and is called for each pass.
    """

    def bits(W: Tensor) -> Tensor:
        return W.detach().float().abs().flatten().contiguous().view(torch.int32)

    high, low = torch.zeros(2**15, dtype=torch.int64), torch.zeros(2**16, dtype=torch.int64)
    for W in weights():
        high += torch.bincount(bits(W) >> 16, minlength=len(high)).cpu()
    count = max(int(share * int(high.sum()) + 1e-9), 1)
    upper = int((high.cumsum(0) < count).sum())
    count -= int(high[:upper].sum())
    for W in weights():
        found = bits(W)
        low += torch.bincount(found[found >> 16 == upper] & 0xFFFF, minlength=len(low)).cpu()
    largest = (upper << 16) + int((low.cumsum(0) < count).sum())
    return float(torch.tensor(largest + 1, dtype=torch.int32).view(torch.float32))


def paper_rate(model: nn.Module) -> float:
    """The paper's learning rate for the theta of a model's adapters, 1e-3 exp(-350 theta); ModelError without any."""
    found = [made.threshold for made in model.modules() if isinstance(made, SaRA)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no adapter of sara")
    return 1e-3 * math.exp(-350 * max(found))


def _original(model: nn.Module, layer: LayerSpec) -> Tensor:
    """The weight that `prepare` will be given."""
    module: Any = model.get_submodule(layer.name)
    if hasattr(module, "original_weight"):
        return module.original_weight()
    return read_weight(getattr(module, "base_layer", module), layer)
