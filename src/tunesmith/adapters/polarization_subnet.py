"""Polarised gates: heads and feed-forward channels are switched per input, until every input switches them alike.

Zhi, Babbar, Liu, Sun, Silavong, Shi and Moran, "Learning a Consensus Sub-Network with Polarization Regularization and
One Pass Training", 2023.

    unit n with output f_n(h):   y = sum_n g_n m_n f_n(h),   g_n = 1[sigma(a_n) > 1/2],   backward: dg_n = d sigma(a_n)
    a = W2 relu(W1 pool(h) + b1) + b2,   h the input of the units' part, sigma(a) = `start` at first
    in evaluation:   G_n = 1[p_n > 1/2],   p_n the mean of g_n over the inputs of recent steps, or of `calibrate`

The regulariser `polarization` drives each p_n to 0 or 1 and the FLOPs of what is open to the wanted share; `cut`
(`polarization_cuts`) then takes the closed units out of the weights. A unit is an attention head (heads that share keys
are one) or one of `groups` groups of neurons. One small network per part gives the gates of all its units.

What the paper leaves open, and what is ours here: the weights below an adapter are frozen, so each unit also has a
trained factor m_n (1 at first); `scale=False` leaves it out where the weights themselves train. Images and the rows of
encoders are pooled over their (real) tokens; in causal models each token has gates of its own, as a pool over a row
would let it see its future. Of the parts' units the `least` with the largest a are always open. The slope of sigma is
not taken below that at |a| = 4, so that no gate dies for good: a closed unit's f_n is still computed in training, and
the loss's slope along g_n can open it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.adapters.polarization_units import Gates, Plan, cuttable, is_causal
from tunesmith.core.adapter import Adapter, Below, Handle, Step
from tunesmith.core.layer import LayerSpec
from tunesmith.core.part import part
from tunesmith.core.targets import spec_of
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2302.10798",
    tags=("mergeable",),
    refuses={"forward-only": "gates learn by a straight-through gradient; differences of losses do not see them"},
)
class PolarizationSubnet(Adapter):
    """Gates on the units that a layer reads: the output projection of attention, or the down projection.

    Args:
        layer: Such a linear layer. If none are named: all whose units can be cut out.
        groups: Groups of neurons per feed-forward part, at most; each is a unit.
        hidden: Width of the network that gives the gates.
        start: sigma(a) at the start.
        least: Units of each part that stay open for every input.
        scale: Whether each unit has a trained factor.
        pool: `row`, one set of gates per row; `token`, one per token; `auto`, `token` in causal models.
        length: Tokens of a row, to count attention's own products among the FLOPs of heads; None leaves them out.
        warmup: Steps without pressure from the regulariser; below 1 a share of the run.
        ramp: Steps in which the pressure grows to its whole; likewise.
        memory: Of p_n: p_n <- memory p_n + (1 - memory) mean of the step.
        gate_lr: Learning rate of the gates' network as a multiple of the run's.

    Attributes:
        p: p_n, (units,) float32, saved.
        costs: c_n, (units,), FLOPs per token.
        by_input: Whether gates follow the input in evaluation too.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    p: Tensor
    costs: Tensor
    unit_of: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        groups: PositiveInt = 16,
        hidden: PositiveInt = 16,
        start: Annotated[float, Field(gt=0.5, lt=1)] = 0.9,
        least: PositiveInt = 1,
        scale: bool = True,
        pool: Literal["auto", "row", "token"] = "auto",
        length: PositiveInt | None = None,
        warmup: NonNegativeFloat = 0.0,
        ramp: NonNegativeFloat = 0.4,
        memory: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        gate_lr: PositiveFloat = 10.0,
    ) -> None:
        super().__init__(layer)
        self.groups, self.hidden, self.start, self.least, self.scale = groups, hidden, start, least, scale
        self.pool, self.length, self.warmup, self.ramp, self.memory = pool, length, warmup, ramp, memory
        self.gate_lr, self.by_input = gate_lr, False
        self.seen: Tensor | None = None
        self._input: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0
        self.gates: nn.Sequential | None = None
        self._hold(torch.zeros(layer.shape[1], dtype=torch.int64))

    def _hold(self, unit_of: Tensor) -> None:
        device, units = self.layer.device, int(unit_of[-1]) + 1
        self.register_buffer("unit_of", unit_of.to(device), persistent=False)
        self.register_buffer("costs", torch.ones(units, device=device), persistent=False)
        self.register_buffer("p", torch.ones(units, device=device))
        self.factors = nn.Parameter(torch.ones(units, device=device)) if self.scale else None

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        if options["pool"] != "row":
            return {}
        return {"padding-free": "rows laid end to end are one row, and each has gates of its own; set pool to token"}

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every layer that reads heads or neurons which can be cut out of this architecture."""
        return list(cuttable(model)[0])

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module:
        """Find the units.

        Raises:
            ModelError: a layer that reads none, or whose units cannot be cut out.
        """
        able, reasons = cuttable(model)
        if strange := [layer.name for layer in layers if layer.name not in able]:
            raise ModelError(
                f"polarization-subnet: {strange[0]!r} "
                + reasons.get(strange[0], "reads no heads or neurons; name output or down projections")
            )
        found = {layer.name: able[layer.name] for layer in layers}
        names = {name for site in found.values() for name in (site.output, *site.inputs)}
        specs = {name: spec_of(model.get_submodule(name), name) for name in names}
        both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        return Plan(found, specs, {name: is_causal(model, name) for name in found}, both)

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        super().join(shared, owner)
        assert isinstance(shared, Plan)
        site, fan_in = shared.sites[self.layer.name], self.layer.shape[1]
        units = site.units if site.kind == "heads" else min(self.groups, site.count)
        if self.least > units:
            raise ModelError(f"polarization-subnet: least={self.least}, and {self.layer.name!r} has {units} units")
        self._hold(torch.arange(fan_in) * units // fan_in)
        weights = sum(math.prod(shared.specs[name].shape) for name in (site.output, *site.inputs))
        attention = 2 * (self.length or 0) * fan_in if site.kind == "heads" else 0  # queries x keys, and x values
        # Groups of neurons may differ in width by one.
        self.costs = 2.0 * (weights + attention) * self.unit_of.bincount() / fan_in
        width = shared.specs[site.inputs[0]].shape[1]
        made = nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, units))
        with torch.no_grad():
            made[2].weight.mul_(0.1)
            made[2].bias.fill_(math.log(self.start / (1 - self.start)))
        self.gates = made.to(self.layer.device, torch.float32)

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        assert isinstance(self.shared, Plan)
        first = model.get_submodule(self.shared.sites[path].inputs[0])
        handles: list[Handle] = [first.register_forward_pre_hook(self._take)]
        if "shared" in self._modules:
            handles.append(model.register_forward_pre_hook(self.shared.note, with_kwargs=True))
        return handles

    def _take(self, module: nn.Module, args: tuple) -> None:
        if (self.training or self.by_input) and self.switched_on():
            self._input = args[0]

    def lr_ratios(self) -> Mapping[str, float]:
        """The gates' own learning rate."""
        names = [n for n, _ in self.named_parameters() if n.startswith("gates.")]
        return dict.fromkeys(names, self.gate_lr) if self.gate_lr != 1 else {}

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        made = adapters[0]
        first, more = (
            n if n >= 1 or n == 0 else n * step.needs_total("polarization-subnet") for n in (made.warmup, made.ramp)
        )
        assert isinstance(made.shared, Plan)
        made.shared.pressure = min(1.0, max(0.0, step.number + 1 - first) / max(more, 1))
        for each in adapters:
            each._sum, each._count = 0.0, 0

    @classmethod
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        for made, (total, count) in zip(adapters, _over_processes(adapters), strict=True):
            if count:
                made.p.lerp_(total / count, 1 - made.memory)
            made.seen = None

    def consensus(self) -> Tensor:
        """G, (units,) float32; the `least` with the largest p are open."""
        if self.least >= len(self.p):
            return torch.ones_like(self.p)
        kept = self.p.sort(descending=True, stable=True).indices[: self.least]
        return (self.p > 0.5).to(self.p.dtype).index_fill(0, kept, 1.0)

    def factor(self, gates: Tensor) -> Tensor:
        """What the layer's input columns are multiplied by, (..., in), for gates (..., units)."""
        return (gates if self.factors is None else gates * self.factors).index_select(-1, self.unit_of)

    def weight(self, W: Tensor) -> Tensor:
        return W * self.factor(self.consensus()).to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        h, self._input = self._input, None
        if self.gates is None or not (self.training or self.by_input):
            return below(x * self.factor(self.consensus()).to(x.dtype))
        if h is None:
            raise ModelError(f"polarization-subnet: {self.layer.name!r} ran without the layer that feeds it")
        gates = self._opened(h)
        columns = self.factor(gates).to(x.dtype)
        return below(x * (columns if gates.dim() == x.dim() else columns[:, None]))

    def _opened(self, h: Tensor) -> Tensor:
        """g for the input of the part, (B, units), or (..., units) with one per token; counts them."""
        assert isinstance(self.shared, Plan)
        real = self.shared.real(self.layer.name, h)
        by_token = self.pool == "token" or (self.pool == "auto" and self.shared.causal[self.layer.name])
        with torch.autocast(h.device.type, enabled=False):
            wide = h.to(next(self.gates.parameters()).dtype)
            if not by_token and h.dim() > 2:
                kept = real[..., None].to(wide.dtype)
                wide = (wide * kept).flatten(1, -2).sum(1) / kept.flatten(1, -2).sum(1).clamp_min(1)
            g: Tensor = Gates.apply(self.gates(wide), self.least)
            weight = (real if g.dim() == h.dim() else real.flatten(1).any(1)).to(g.dtype)
            total, count = (g * weight[..., None]).flatten(0, -2).sum(0), weight.sum()
            self.seen = total / count.clamp_min(1)
        self._sum, self._count = self._sum + total.detach(), self._count + count.detach()
        return g

    def polarity(self) -> tuple[Tensor | None, Tensor, Tensor, float]:
        """For the regulariser: the mean of g over the last forward pass with its graph, p, FLOPs per unit, pressure."""
        assert isinstance(self.shared, Plan)
        return self.seen, self.p, self.costs, self.shared.pressure


def _over_processes(adapters: Sequence[PolarizationSubnet]) -> list[tuple[Tensor, Tensor]]:
    """(sum of gates, their number) of each layer over the step's micro-batches and all processes."""
    sums = [(made.p * 0 + made._sum, made.p.new_zeros(1) + made._count) for made in adapters]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    together = torch.cat([t for pair in sums for t in pair])
    dist.all_reduce(together)
    split = iter(together.split([t.numel() for pair in sums for t in pair]))
    return [(total, next(split)) for total in split]
