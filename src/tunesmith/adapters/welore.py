"""WeLore: layers whose spectrum falls fast become two factors, which train; the others stay as they are, frozen.

Jaiswal, Yin, Zhang, Liu, Zhao, Tian and Wang, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from
Low-Rank Gradients", 2024 (section 3).

    W (m, n) = sum_i s_i u_i v_i^T,   s~_i = (s_i - min s) / (max s - min s)
    pruned(k) = #{i: s~_i < k},   k* one for all layers, with sum pruned(k*) = ratio * sum min(m, n)
    pruned(k*) / min(m, n) > min_ratio:   r = min(m, n) - pruned(k*),   y = U V x + b,
                                          U = U_r S_r^(1/2) (m, r),   V = S_r^(1/2) V_r^T (r, n), both trained
    otherwise the layer does not change and does not train

The paper bisects for k*, and prints it for LLaMA-2 (`threshold`); here it is read off the sorted s~, which is where a
bisection ends. A layer whose singular values are all equal (s~ = 0/0) has nothing to leave out: its s~ are 1.

What `ratio` counts are singular values, not parameters: a square layer at half its rank is as large as before, and
layers that are not compressed give nothing. `summary` counts both. One value far above the others pushes their s~ below
k*, so that little of the layer is left, with a warning.

Where we differ from the released code: it drops a layer's bias, and stores the factors in bfloat16; here the bias
stays and the factors are float32. U V is never made in training, and replaces W when merged. The frozen W of a
compressed layer stays in memory, so that switching the adapter off gives the base; it gets no gradient and no state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below, Handle, Statistics
from tunesmith.core.layer import LayerSpec, read_weight
from tunesmith.core.lowrank import low_rank, with_signs
from tunesmith.core.part import part
from tunesmith.core.report import Figure, Report, Table
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

FLAT = 1e-3
"""Singular values that differ by less than this of the largest, as those of an orthogonal matrix do, are equal."""
SQUEEZED = 0.9
"""A layer that keeps one singular value with less than this share of |W|^2 is warned of."""


@part(paper="arXiv:2407.11239", tags=("mergeable",))
class WeLore(Adapter):
    """Two trained factors in the place of the frozen weight, where it compresses well.

    Args:
        layer: A linear layer.
        ratio: Share of all layers' singular values below the common threshold.
        min_ratio: A layer that loses a larger share of its own than this becomes factors; the others stay as they are.
            0 compresses every layer that loses any (the paper's compression without training).
        threshold: k* itself instead of `ratio`.
        rank: Given instead of found: that of every layer, at most its smaller side. A table of ranks sets it per layer.

    Attributes:
        rank: r; 0 for a layer that does not change.
        U: (out, r) float32, or None.
        V: (r, in) float32, or None.
        given: r, saved: another machine's rounding may find another rank than the file has.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    neutral: ClassVar[Mapping[str, object]] = {"rank": 1 << 20}
    given: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        min_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.4999,
        threshold: PositiveFloat | None = None,
        rank: PositiveInt | None = None,
    ) -> None:
        super().__init__(layer)
        self.ratio, self.min_ratio, self.threshold = ratio, min_ratio, threshold
        self.register_buffer("given", torch.tensor(0, device=layer.device))
        self.resize(min(rank or 0, *layer.shape))

    def resize(self, rank: int) -> None:
        """Make room for factors of that rank; none for 0."""
        self.rank = rank
        self.given.fill_(rank)
        (out, fan_in), device = self.layer.shape, self.layer.device
        self.U = nn.Parameter(torch.zeros(out, rank, device=device)) if rank else None
        self.V = nn.Parameter(torch.zeros(rank, fan_in, device=device)) if rank else None

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module | None:
        """The ranks of all layers, found when the first layer without a given one asks."""
        return None if options["rank"] else _Plan(partial(_found, model, list(layers), options))

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        if isinstance(shared, _Plan) and not self.rank:  # it is not kept: the adapter has its rank
            self.resize(shared.rank(self.layer.name))

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        if self.U is None or self.V is None:
            return
        U, S, Vh = torch.linalg.svd(W.detach().float(), full_matrices=False)
        left, right = with_signs(U[:, : self.rank], Vh[: self.rank].T)
        root = S[: self.rank].sqrt()
        with torch.no_grad():
            self.U.copy_(left * root)
            self.V.copy_((right * root).T)

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        layer = model.get_submodule(path)
        assert isinstance(layer, TunesmithLayer)
        if self.rank and layer.tunesmith_adapters[self.group][0] is not self:
            raise ModelError(
                f"welore replaces the weight of {path!r} and with it what an adapter below it changes: name `welore` "
                "first in the list of adapters"
            )
        return ()

    def weight(self, W: Tensor) -> Tensor:
        return W if self.U is None or self.V is None else F.linear(self.U, self.V.T).to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        if self.U is None or self.V is None:
            return below(x)
        bias = below.bias
        if x.dtype == self.V.dtype and not torch.is_autocast_enabled(x.device.type):
            return F.linear(F.linear(x, self.V), self.U, None if bias is None else bias.to(x.dtype))
        y = low_rank(x, self.V, self.U)  # keeps x as it is instead of a copy in the factors' dtype
        return y if bias is None else y + bias.to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}given")
        if saved is not None and int(saved) != self.rank:
            trains = self.U is None or self.U.requires_grad
            self.resize(int(saved))
            self.requires_grad_(trains)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Plan(nn.Module):
    """The ranks of all layers by name; holds nothing that trains or is saved."""

    def __init__(self, find: Callable[[], dict[str, int]]) -> None:
        super().__init__()
        self._find: Callable[[], dict[str, int]] | None = find
        self._ranks: dict[str, int] = {}

    def rank(self, name: str) -> int:
        """Of one layer."""
        if self._find is not None:
            self._ranks, self._find = self._find(), None  # it refers to the model
        return self._ranks[name]


def normalised(S: Tensor) -> Tensor:
    """s~ of singular values (k,), float64 in [0, 1]; 1 where all are equal (up to `FLAT`)."""
    S = S.double()
    width = S.max() - S.min()
    return (S - S.min()) / width if width > FLAT * S.max() else torch.ones_like(S)


def threshold_for(values: Mapping[str, Tensor], ratio: float) -> float:
    """k*: as many s~ of all layers lie below it as `ratio` of them, rounded; fewer where several are equal to it.

    Args:
        values: s~ of each layer, (min(m, n),).
    """
    ordered = torch.cat([v.cpu() for v in values.values()]).sort().values
    return float(ordered[min(round(ratio * len(ordered)), len(ordered) - 1)])


def _found(model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> dict[str, int]:
    """The rank of each layer; 0 for those that stay as they are.

    Raises:
        ModelError: weights without values, or not finite; or no layer loses enough.
    """
    spectra = {layer.name: torch.linalg.svdvals(_weight(model, layer).float()) for layer in layers}
    values = {name: normalised(S) for name, S in spectra.items()}
    k = options["threshold"] or threshold_for(values, options["ratio"])
    pruned = {name: int((v < k).sum()) / len(v) for name, v in values.items()}
    # The largest is 1 and stays unless the threshold is above it: no layer is left without rank.
    kept = {name: max(1, int((v >= k).sum())) for name, v in values.items()}
    ranks = {name: kept[name] if share > options["min_ratio"] else 0 for name, share in pruned.items()}
    if not any(ranks.values()):
        most = max(pruned, key=lambda name: pruned[name])
        raise ModelError(
            f"welore: no layer compresses at the threshold {k:.3g}. The one that loses most is {most!r}, "
            f"{pruned[most]:.1%} of its singular values; min_ratio={options['min_ratio']} asks for more. Raise `ratio` "
            "or lower `min_ratio`"
        )
    energy = {n: float(spectra[n][0].square() / spectra[n].square().sum()) for n, r in ranks.items() if r == 1}
    if squeezed := {name: share for name, share in energy.items() if share < SQUEEZED}:
        name, share = next(iter(squeezed.items()))
        warnings.warn(
            f"welore: one singular value far above the others leaves {len(squeezed)} layers with rank 1 (the first: "
            f"{name!r}, {share:.0%} of its squared norm). Leave them out (`exclude_modules`) or lower `ratio`.",
            stacklevel=2,
        )
    return ranks


def _weight(model: nn.Module, layer: LayerSpec) -> Tensor:
    module = model.get_submodule(layer.name)
    W = module.original_weight() if isinstance(module, TunesmithLayer) else read_weight(module, layer).detach()
    if W.is_meta or not bool(W.isfinite().all()):
        raise ModelError(
            f"welore: ranks follow from the singular values of the weights; {layer.name!r} "
            f"{'has no values (meta device); load the model first' if W.is_meta else 'has values that are not finite'}"
        )
    return W


def summary(model: nn.Module) -> Report:
    """What became of each layer: singular values left out, and numbers in the layer and in its factors.

    Raises:
        ModelError: no `welore` on the model.
    """
    held = [m for m in model.modules() if isinstance(m, WeLore)]
    if not held:
        raise ModelError("summary: there is no welore adapter on this model")
    table = Table("layers", ["layer", "smaller side", "rank", "numbers", "in factors"], units=["", *["count"] * 4])
    for made in held:
        (m, n), r = made.layer.shape, made.rank
        table.rows.append([made.layer.name, min(m, n), r or min(m, n), m * n, r * (m + n) if r else m * n])
    sides, ranks, dense, now = (sum(int(row[at]) for row in table.rows) for at in range(1, 5))  # type: ignore[arg-type]
    figures: dict[str, Any] = {
        "layers in factors": Figure(sum(made.rank > 0 for made in held), unit="count", of=len(held)),
        "singular values left out": Figure(sides - ranks, unit="count", of=sides),
        "numbers saved": Figure(dense - now, unit="count", of=dense, help="Of these layers, biases left out."),
        "numbers that train": Figure(sum(made.trainable_count() for made in held), unit="count"),
    }
    return Report("welore", figures=figures, tables=[table])
