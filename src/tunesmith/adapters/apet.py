"""APET: a given count of trainable numbers at random places, to compare what structure is worth.

Su et al., "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", EMNLP 2023; its first version was
"Arbitrary Few Parameters are Good Enough for Adapting Large-scale Pre-trained Language Models".

`granularity="element"`: exactly n entries of the weights and biases of all target layers train, drawn uniformly without
replacement, so that the counts of the layers follow a multivariate hypergeometric distribution. What is kept is their
indices and their changes. `granularity="tensor"` (as released): LoRA pairs and bottleneck adapters stand wherever they
could; n / 2 numbers are spent on whole ones of them in random order and n / 2 on whole tensors of the backbone, leaving
out what does not fit; what the halves leave goes to whatever still fits. Never more than n numbers train, and less than
the smallest tensor that was left out is unspent.

Everything trained is a change that starts at zero (of a bottleneck, its output): the frozen weights are not touched, so
that neither momentum nor weight decay moves what was not drawn, and decay pulls towards the pretrained weights.

Differences from the released code: it checks only the first tensor of a group against what is left and can overshoot,
and finds no tensors at all without DeepSpeed ZeRO-3. Two target layers that hold one weight are an error here, since
its entries must be counted once.

With entries drawn, a layer computes from a copy of its weight. Gathering the inputs that the entries touch instead is
slower on a CPU for more than a few tokens (768 x 768, 0.5 % drawn, 512 tokens: 82 ms forward and backward against 41).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below, Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import roles_from_names
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError

Group = tuple[str, str]
"""A layer and what trains there as a whole: `lora`, `bottleneck`, `weight` or `bias`."""


def draw(total: int, n: int, *keys: int | str) -> Tensor:
    """n of 0..total-1 without replacement, uniform, ascending, int64; memory of the order of n, not of `total`."""
    g, few = generator(*keys), min(n, total - n)
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < few:
        # 62 random bits: a remainder of 32 would favour small numbers.
        more = torch.randint(2**62, (few + few // 2 + 16,), generator=g) % total
        found = torch.cat([found, more]).unique()
    # Whatever values came up, all sets of so many were equally likely; so are their subsets.
    found = found[torch.randperm(len(found), generator=g)[:few]].sort().values
    if few == n:
        return found
    kept = torch.ones(total, dtype=torch.bool)
    kept[found] = False
    return kept.nonzero().flatten()


def spend(groups: Mapping[Group, int], n: int, seed: int) -> set[Group]:
    """Groups of at most n numbers together: n / 2 on inserted ones, n / 2 on the backbone's, then on any that fit."""
    inserted = [group for group in groups if group[1] in ("lora", "bottleneck")]
    backbone = [group for group in groups if group[1] in ("weight", "bias")]
    chosen: set[Group] = set()
    shuffled: list[Group] = []
    for half, names in enumerate((inserted, backbone)):
        order = torch.randperm(len(names), generator=generator(seed, "apet", n, half)).tolist()
        names = [names[i] for i in order]
        shuffled += names
        _take(names, groups, n // 2, chosen)
    _take(shuffled, groups, n - sum(groups[group] for group in chosen), chosen)
    return chosen


def _take(names: Iterable[Group], groups: Mapping[Group, int], left: int, chosen: set[Group]) -> None:
    for group in names:
        if group not in chosen and groups[group] <= left:
            chosen.add(group)
            left -= groups[group]


class Plan(nn.Module):
    """What trains in each layer; it has no tensors of its own once the layers have taken theirs."""

    def __init__(self, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.entries: dict[Group, Tensor] = {}
        self.groups: set[Group] = set()
        self.holders: dict[tuple[int, torch.Size], str] = {}
        backbone = {(s.name, "weight"): math.prod(s.shape) for s in layers}
        backbone |= {(s.name, "bias"): s.out_features for s in layers if s.has_bias}
        roles = roles_from_names(f"{s.name}.weight" for s in layers)
        inserted: dict[Group, int] = {}
        for s in layers:
            if s.kind == "linear":
                (out, into), width = s.shape, options["bottleneck"]
                inserted[s.name, "lora"] = options["lora_rank"] * (out + into)
                if roles[f"{s.name}.weight"].kind in ("o", "down"):
                    inserted[s.name, "bottleneck"] = 2 * width * out + width + out
        tensors = options["granularity"] == "tensor"
        eligible = {**inserted, **backbone} if tensors else backbone
        available = sum(eligible.values())
        self.n = n = _count(options["budget"], {**inserted, **backbone}, sum(backbone.values()))
        if n > available:
            raise ModelError(
                f"apet: the budget is {n:,} numbers; the target layers have {available:,}. Lower `budget`."
            )
        if tensors:
            self.groups = spend(eligible, n, options["seed"])
            if not self.groups:
                least = min(eligible, key=lambda group: eligible[group])
                raise ModelError(
                    f"apet: a budget of {n:,} numbers pays for nothing whole; the smallest group, {least[1]} of "
                    f"{least[0]!r}, has {eligible[least]:,}. Raise `budget` or set granularity='element'."
                )
            return
        first, drawn = 0, draw(available, n, options["seed"], "apet", n)
        for group, size in backbone.items():
            start, end = torch.searchsorted(drawn, torch.tensor([first, first + size])).tolist()
            if end > start:
                index = drawn[start:end] - first
                self.entries[group] = index.to(torch.int32 if size < 2**31 else torch.int64)
            first += size


def _count(budget: float | str, sizes: Mapping[Group, int], weights: int) -> int:
    """n of the option `budget`."""
    if isinstance(budget, str):
        which = {"lora": "lora", "adapter": "bottleneck", "bitfit": "bias"}[budget]
        n = sum(size for (_, kind), size in sizes.items() if kind == which)
        if not n:
            raise ModelError(f"apet: the count of {budget!r} on the target layers is 0; give `budget` as a number")
        return n
    return budget if isinstance(budget, int) else math.ceil(budget * weights)


@part(paper="arXiv:2306.02320", tags=("mergeable",))
class APET(Adapter):
    """A layer's share of the trainable numbers.

    Args:
        layer: Any layer that holds a weight.
        budget: n: a count, a share of the target layers' weights and biases, or the count of a known method on the
            same layers: `lora` (of `lora_rank`), `adapter` (of width `bottleneck`, after the output projections of
            attention and MLP) or `bitfit`.
        granularity: `element` or `tensor`, see above.
        lora_rank: r of a LoRA pair.
        lora_alpha: A pair's change is alpha / r B A.
        bottleneck: Width of a bottleneck adapter; one that is drawn cannot be merged.
        seed: Of the draw.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm", "embedding"})
    weight_change: Tensor | None
    bias_change: Tensor | None
    weight_at: Tensor | None
    bias_at: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        budget: PositiveInt | Annotated[float, Field(gt=0, le=1)] | Literal["lora", "adapter", "bitfit"] = 0.005,
        granularity: Literal["element", "tensor"] = "element",
        lora_rank: PositiveInt = 8,
        lora_alpha: PositiveFloat = 16.0,
        bottleneck: PositiveInt = 24,
        seed: int = 0,
    ) -> None:
        super().__init__(layer)
        self.rank, self.scale, self.width, self.seed = lora_rank, lora_alpha / lora_rank, bottleneck, seed
        self.plan: Plan | None = None
        for name in ("weight_change", "bias_change", "A", "B", "down", "down_bias", "up", "up_bias"):
            self.register_parameter(name, None)
        self.register_buffer("weight_at", None)
        self.register_buffer("bias_at", None)

    @classmethod
    def share(cls, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> Plan:
        return Plan(layers, options)

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        """Take this layer's part of a plan; an adapter in none changes nothing."""
        if not isinstance(shared, Plan):
            return
        layer, out = self.layer, self.layer.out_features
        self.__dict__["plan"] = shared
        for which, shape in (("weight", layer.shape), ("bias", (out,))):
            index = shared.entries.pop((layer.name, which), None)
            if index is not None:
                setattr(self, f"{which}_at", index.to(layer.device))
                shape = tuple(index.shape)
            if index is not None or (layer.name, which) in shared.groups:
                setattr(self, f"{which}_change", self._zeros(*shape))
        if (layer.name, "lora") in shared.groups:
            self.A, self.B = self._normal("A", self.rank, layer.shape[1]), self._zeros(out, self.rank)
        if (layer.name, "bottleneck") in shared.groups:
            self.down, self.down_bias = self._normal("down", self.width, out), self._zeros(self.width)
            self.up, self.up_bias = self._zeros(out, self.width), self._zeros(out)

    def _zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, device=self.layer.device))

    def _normal(self, name: str, *shape: int) -> nn.Parameter:
        g = generator(self.seed, "apet", self.layer.name, name)
        return nn.Parameter((torch.randn(shape, generator=g) / math.sqrt(3 * shape[1])).to(self.layer.device))

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        """Refuse a weight that another target layer holds too.

        Raises:
            ModelError: names both layers.
        """
        # Otherwise W was made for this call, and another one may come to lie where it did.
        stored = not (self.layer.quantized or self.layer.unit_offset or W.is_meta)
        if self.plan is None or not stored:
            return
        before = self.plan.holders.setdefault((W.data_ptr(), W.shape), self.layer.name)
        if before != self.layer.name:
            raise ModelError(
                f"apet: {before!r} and {self.layer.name!r} hold one and the same weight, whose entries count once; "
                "leave one of them out of `target_modules`"
            )

    def weight(self, W: Tensor) -> Tensor:
        W = _added(W, self.weight_change, self.weight_at)
        return W if self.A is None else W + (self.scale * (self.B @ self.A)).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else _added(b, self.bias_change, self.bias_at)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        coarse = self.layer.quantized or self.layer.dtype in (torch.bfloat16, torch.float16)
        if self.layer.kind != "linear" or (self.weight_at is not None and not coarse):
            return super().forward(x, below)
        out = below(x)
        if self.weight_change is not None:
            # Added to a coarse weight a small change would be rounded away; added to the output it is not.
            nothing = torch.zeros(self.layer.shape if self.weight_at is not None else (), device=x.device)
            out = out + below.apply(x, _added(nothing, self.weight_change, self.weight_at), None)
        if self.bias_change is not None:
            nothing = torch.zeros(self.layer.out_features, device=x.device)
            out = out + _added(nothing, self.bias_change, self.bias_at).to(out.dtype)
        if self.A is not None:
            out = out + self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B).to(out.dtype)
        if self.down is not None:
            hidden = F.gelu(F.linear(out.to(self.down.dtype), self.down, self.down_bias))
            out = out + F.linear(hidden, self.up, self.up_bias).to(out.dtype)
        return out

    def unmergeable(self) -> str | None:
        """Why it cannot be folded into the layer, if a bottleneck was drawn for it."""
        return None if self.down is None else "a bottleneck adapter is not linear; keep the adapter folder"


def _added(tensor: Tensor, change: Tensor | None, at: Tensor | None) -> Tensor:
    """A tensor plus its change, at some of its entries or everywhere."""
    if change is None:
        return tensor
    change = change.to(tensor.dtype)
    return tensor + change if at is None else tensor.reshape(-1).index_add(0, at, change).view(tensor.shape)


@dataclass(frozen=True)
class Study:
    """Metrics of random structures by count, larger is better.

    Attributes:
        metrics: `{n: one metric per structure}`.
    """

    metrics: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def mean(self, n: int) -> float:
        return sum(self.metrics[n]) / len(self.metrics[n])

    def spread(self, n: int) -> float:
        """Largest minus smallest over the structures."""
        return max(self.metrics[n]) - min(self.metrics[n])

    def threshold(self, metric: float) -> int | None:
        """The smallest n whose mean is at least `metric`: chance plus a margin gives the paper's low threshold, full
        fine-tuning's metric the high one; None if no n reaches it."""
        return min((n for n in self.metrics if self.mean(n) >= metric), default=None)


def study(score: Callable[[int, int], float], counts: Iterable[int], structures: int = 3) -> Study:
    """Train `structures` random structures at every count. `score(n, seed)` trains one and returns its metric."""
    return Study({n: [score(n, seed) for seed in range(structures)] for n in sorted(set(counts))})
