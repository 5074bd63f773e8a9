"""Intrinsic dimension: a whole model tuned through d random coordinates, and the smallest d that is enough.

Aghajanyan, Zettlemoyer and Gupta, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
ACL 2021, after Li, Farkhoor, Liu and Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018.

    theta_i = theta0_i + P_i(z)                for every tensor i of the model       (DID)
    theta_i = theta0_i + lambda_l(i) P_i(z)    with one scale per layer l            (SAID)
    P(z) = (H diag(g) Pi H diag(b) z)[:D] / sqrt(D sum g^2)                          (Fastfood)

for a tensor of D numbers: H the unnormalised Walsh-Hadamard matrix of size L, the power of two from max(D, d) on, b
random signs, Pi a random permutation, g ~ N(0, 1). Nothing of size D x d exists; a map costs L log L and keeps 8 L
bytes. z starts at zero and the scales at one: the model starts at the base. d counts all that trains: m scales leave
d - m coordinates to z. The d90 of a task is the smallest d that reaches 90 % of full fine-tuning's metric.

Differences from the released code. Its backward pass divides by sqrt(L) in each of two Hadamard products that its
forward pass does not normalise: its gradient is 1 / L of the true one, and L differs by tensor. Beside m scales it
leaves d - m - 1 coordinates. Where a tensor is smaller than d it drops the last coordinates without a word; here L
grows with d. It has a scale per tensor (`scale_per="tensor"`): some 390 in a RoBERTa-large, which the 207 numbers of
the paper's d90 on MRPC cannot pay, so that a layer here is a block by default.

Tied weights are one tensor: every layer that holds them computes with the same map and scale. Merging writes the change
once, by the last of those layers, and unmerging gives the original back bit for bit. Parameters that no layer holds (a
ViT's class token and position embeddings, experts stored as one tensor) stay frozen.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below, Statistics
from tunesmith.core.layer import LayerSpec, kind_of
from tunesmith.core.modelmap import depths
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError, TunesmithError


@functools.cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    H = torch.ones(1, 1, device=device)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class Hadamard(torch.autograd.Function):
    """H x for x of a power of two entries, float32, in O(L log L); H is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size, done, x = x.numel(), 1, x.clone()
        with torch.autocast(x.device.type, enabled=False):
            while done < size:  # H is a Kronecker product; one factor at a time
                H = _hadamard_matrix(min(64, size // done), x.device)
                x = x.view(-1, len(H)) @ H if done == 1 else H @ x.view(-1, len(H), done)
                done *= len(H)
        return x.view(size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Hadamard.apply(grad)


class Fastfood:
    """The map of one tensor of `size` numbers."""

    def __init__(self, size: int, d: int, g: torch.Generator, device: torch.device) -> None:
        length = 1 << (max(size, d) - 1).bit_length()
        self.size, self.block = size, 1 << (d - 1).bit_length()
        self.b = (2 * torch.randint(2, (d,), generator=g) - 1).float().to(device)
        permutation = torch.randperm(length, generator=g)
        self.permutation = permutation.to(device, torch.int32 if length < 2**31 else torch.int64)
        factors = torch.randn(length, generator=g)
        self.g = (factors / (size * factors.double().square().sum()).sqrt()).float().to(device)

    def __call__(self, z: Tensor) -> Tensor:
        # Behind z are zeros only, so the first product of length L is one of length `block` again and again.
        first = Hadamard.apply(F.pad(z * self.b, (0, self.block - len(z))))
        mixed = first.repeat(len(self.g) // self.block).index_select(0, self.permutation)
        return Hadamard.apply(mixed * self.g)[: self.size]


class Dense:
    """A matrix of normal numbers: with unit columns, or of standard deviation 0.01 (the released `random`)."""

    def __init__(self, size: int, d: int, g: torch.Generator, device: torch.device, unit: bool) -> None:
        P = torch.randn(size, d, generator=g)
        self.P = (P / P.norm(dim=0) if unit else 0.01 * P).to(device)

    def __call__(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.P @ z


class Subspace(nn.Module):
    """What the layers share: z, the scales, and the map of every tensor, drawn from its name when first used."""

    def __init__(self, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.d, self.kind, self.seed = options["d"], options["map"], options["seed"]
        tensors = {(s.name, "weight"): math.prod(s.shape) for s in layers}
        tensors |= {(s.name, "bias"): s.out_features for s in layers if s.has_bias}
        gigabytes = sum(tensors.values()) * self.d / 2**28
        if self.kind != "fastfood" and gigabytes > 1:
            raise ModelError(
                f"intrinsic-dimension: a {self.kind} map of d={self.d} on {sum(tensors.values()):,} weights is a "
                f"matrix of {gigabytes:.1f} GiB (at most 1); set map='fastfood'"
            )
        places, per = depths(s.name for s in layers), options["scale_per"]
        self.groups: dict[tuple[str, str], object] = {}
        for name, which in tensors if options["structure_aware"] else ():
            depth = places[name] if per == "block" else None
            self.groups[name, which] = depth or ((name, which) if per == "tensor" else name)
        self.maps: dict[tuple[str, str], tuple[torch.device, Fastfood | Dense]] = {}
        self.sources: dict[tuple[int, torch.Size], str] = {}
        self.writers: dict[str, str] = {}
        self.owned = False
        self.z = nn.Parameter(torch.empty(0, device=layers[0].device))
        self._divide()

    def _divide(self) -> None:
        """Share d out: one number per scale, the rest to z."""
        self.index = {group: i for i, group in enumerate(dict.fromkeys(self.groups.values()))}
        m, like = len(self.index), self.z
        if self.d <= m:
            raise ModelError(
                f"intrinsic-dimension: d={self.d} must pay for {m} scales and at least one coordinate; raise `d`, set "
                "scale_per='block', or structure_aware=False"
            )
        self.z = nn.Parameter(torch.zeros(self.d - m, device=like.device), like.requires_grad)
        self.scales = nn.Parameter(torch.ones(m, device=like.device), like.requires_grad) if m else None

    def hold(self, name: str, W: Tensor) -> str:
        """The first layer that holds `W`, whose map and scale are for all of them; the last one writes in merging."""
        source = self.sources.setdefault((W.data_ptr(), W.shape), name)
        self.writers[source] = name
        if source != name and self.groups.pop((name, "weight"), None) is not None:
            self._divide()
        return source

    def change(self, name: str, which: str, size: int, device: torch.device) -> Tensor:
        """lambda P(z) of a tensor, (size,) float32."""
        z, held = self.z.to(device, torch.float32), self.maps.get((name, which))
        if held is None or held[0] != device:
            drawn = size, len(z), generator(self.seed, "intrinsic-dimension", name, which), device
            held = (device, Fastfood(*drawn) if self.kind == "fastfood" else Dense(*drawn, self.kind == "dense"))
            self.maps[name, which] = held
        if self.scales is None:
            return held[1](z)
        return self.scales.to(device, torch.float32)[self.index[self.groups[name, which]]] * held[1](z)


@part(
    paper="arXiv:2012.13255",
    tags=("mergeable", "whole-model"),
    refuses={
        "adapters": "every weight of the model moves in the one random subspace, and nothing beside it",
        "fsdp": "all layers compute from one shared vector, which sharded layers cannot hold",
    },
)
class IntrinsicDimension(Adapter):
    """A layer's share of a model that moves in a random subspace.

    Args:
        layer: Any layer that holds a weight.
        d: Numbers that train, in all layers together.
        structure_aware: SAID; False is DID, without scales.
        scale_per: What has a scale of its own: a `block` (and each layer outside of the blocks), a `layer`, or a
            `tensor` as in the released code.
        map: `fastfood`; `dense`, normal with unit columns, and `random`, normal of 0.01, for small models.
        fresh: Words in the names of layers that the base checkpoint lacks, such as a new head: their start is saved
            with the adapter. A new bias is taken to start at zero.
        seed: Of the maps.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm", "embedding"})
    subspace: Any
    start: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        d: PositiveInt = 1000,
        structure_aware: bool = True,
        scale_per: Literal["block", "layer", "tensor"] = "block",
        map: Literal["fastfood", "dense", "random"] = "fastfood",
        fresh: tuple[str, ...] = ("classifier", "pre_classifier", "classification_head", "score", "qa_outputs"),
        seed: int = 0,
    ) -> None:
        super().__init__(layer)
        self.is_fresh = bool(set(fresh) & set(layer.name.split(".")))
        self.source = layer.name
        self.subspace = None

    @classmethod
    def share(cls, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> Subspace:
        return Subspace(layers, options)

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        """Take part in a subspace; an adapter in none changes nothing."""
        if isinstance(shared, Subspace) and not shared.owned:
            # PEFT leaves out what is in `modules_to_save`, which the first layer may be: this is the first made.
            shared.owned, self.subspace = True, shared
        else:
            self.__dict__["subspace"] = shared

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every layer that holds weights, the head too, if its forward takes one input and no more."""
        held = []
        for name, module in model.named_modules():
            inner = "tunesmith_" in name or ".modules_to_save." in name or ".original_module" in name
            # OPT's position embedding and gated norms take more inputs than an adapter passes on.
            if name and not inner and kind_of(module) and len(inspect.signature(type(module).forward).parameters) == 2:
                held.append(name.removesuffix(".base_layer"))
        return held

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        """Keep the start of a fresh layer, and find the layers that hold one and the same weight."""
        if self.is_fresh:
            self.register_buffer("start", W.detach().clone())
        # Otherwise W was made for this call, and another one may come to lie where it did.
        stored = not (self.layer.quantized or self.layer.unit_offset or W.is_meta)
        if self.subspace is not None and stored:
            self.source = self.subspace.hold(self.layer.name, W)

    @property
    def written_elsewhere(self) -> bool:
        """Whether merging writes the change of this weight by another layer."""
        writers = {} if self.subspace is None else self.subspace.writers
        return writers.get(self.source, self.layer.name) != self.layer.name

    def change(self, which: Literal["weight", "bias"]) -> Tensor:
        """What is added to the layer's weight, in its canonical shape, or to its bias; 0 outside of a subspace."""
        if self.subspace is None:
            return torch.zeros((), device=self.layer.device)
        shape = self.layer.shape if which == "weight" else (self.layer.out_features,)
        name = self.source if which == "weight" else self.layer.name
        return self.subspace.change(name, which, math.prod(shape), self.layer.device).view(shape)

    def weight(self, W: Tensor) -> Tensor:
        """The changed weight; W itself where another layer that holds the same weight writes the change.

        Raises:
            ModelError: an adapter above asks for that in training, and would miss the change.
        """
        if not self.written_elsewhere:
            return self._changed(W)
        if self.training and torch.is_grad_enabled():
            raise ModelError(
                f"the weight of {self.layer.name!r} is tied to another layer's, and no adapter can stand on top of "
                "intrinsic-dimension there; put intrinsic-dimension last in the stack"
            )
        return W

    def _changed(self, W: Tensor) -> Tensor:
        W = self.start.to(W.device, W.dtype) if self.is_fresh else W
        return W + self.change("weight")

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else b + self.change("bias")

    def forward(self, x: Tensor, below: Below) -> Tensor:
        coarse = self.layer.quantized or self.layer.dtype in (torch.bfloat16, torch.float16)
        if not coarse or self.layer.kind not in ("linear", "conv") or self.subspace is None or self.is_fresh:
            return below.apply(x, self._changed(below.weight), self.bias(below.bias))
        # Added to such a weight a small change would be rounded away; added to the output it is not.
        bias = self.change("bias") if self.layer.has_bias else None
        return below(x) + below.apply(x, self.change("weight"), bias)


def d90(curve: Mapping[int, float], full: float, share: float = 0.9) -> int | None:
    """The smallest d of `{d: metric}` whose metric reaches `share` of full fine-tuning's; None if none does.

    Raises:
        TunesmithError: `full` is not positive, so that a share of it says nothing.
    """
    if not full > 0:
        raise TunesmithError(f"d90 takes a metric that is positive and better when larger; full fine-tuning has {full}")
    return min((d for d, metric in curve.items() if metric >= share * full), default=None)


def search(
    score: Callable[[int], float], grid: Iterable[int], full: float, share: float = 0.9
) -> tuple[int | None, dict[int, float]]:
    """`d90` over a grid of d, and the whole curve. `score(d)` trains with d numbers and returns the metric."""
    curve = {d: score(d) for d in sorted(set(grid))}
    return d90(curve, full, share), curve


def generalisation_bound(train_error: float, d: int, n: int, c: float = 1.0) -> float:
    """train_error + c sqrt(d / n) for n examples, the form of the paper's bound.

    Its constant is not known: compare models by it, it guarantees nothing.
    """
    return train_error + c * math.sqrt(d / n)
