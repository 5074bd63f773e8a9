"""Bottleneck adapters and a prefix: small modules after, beside and before what a block computes.

Zhou, Wan, Vulic and Korhonen, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning", TACL
2024, section 2; the modules are those of Pfeiffer et al. 2021, He et al. 2022, and Li and Liang 2021.

    f' = f + U_s relu(D_s f + d_s) + u_s + s (U_p relu(D_p x + d_p) + u_p)     f: feed-forward output, x: its input
    Attention(Q, K, V) -> Attention(Q, [P_k; K], [P_v; V])                      in the block's self-attention

x is what the block's first feed-forward layer reads, f what its last gives. Every U starts at zero, so that bottlenecks
start as the identity. A prefix does not: its values start at zero, but its keys take their share of each softmax.

The released code feeds the serial bottleneck LayerNorm(f + residual), which only a post-norm encoder has; ours reads f,
in every architecture. It trains the prefix through an MLP that its own cost model leaves out; ours trains the keys and
values themselves, so that what is counted is what trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from tunesmith.core import attend
from tunesmith.core.adapter import Adapter, Below, Handle
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import block_linears, roles_from_names
from tunesmith.core.part import part
from tunesmith.core.targets import spec_of
from tunesmith.errors import ModelError

Place = tuple[str, int]
"""A stack's path and the number of a block in it."""


@dataclass(frozen=True)
class Block:
    """The sizes of one block that modules depend on.

    Attributes:
        width: Of the feed-forward layers' input and output.
        keys: Width of keys, and of values, of its self-attention: key heads times their dimension.
        layers: Feed-forward output layers in it; more than one in a mixture of experts.
    """

    width: int
    keys: int
    layers: int = 1

    def count(self, serial: int, parallel: int, prefix: int) -> int:
        """Numbers that train in the block with modules of these sizes; 0 is off. Biases are counted."""
        narrow = sum(2 * self.width * size + size + self.width for size in (serial, parallel) if size)
        return self.layers * narrow + 2 * self.keys * prefix


def blocks_of(model: nn.Module) -> list[Block]:
    """The sizes of a model's blocks, in the order in which `layers` counts them.

    Raises:
        ModelError: a block has no attention whose keys can be told.
    """
    found: dict[Place, list[str]] = {}
    for name in Bottleneck.targets(model):
        found.setdefault(_place(name), []).append(name)
    order = list(found)
    stacks = list(dict.fromkeys(stack for stack, _ in order))
    order.sort(key=lambda place: (stacks.index(place[0]), place[1]))
    made = []
    for place in order:
        names = found[place]
        width = spec_of(model.get_submodule(names[0]), names[0]).out_features
        made.append(Block(width, _attention(model, names[0])[1], len(names)))
    return made


class _Narrow(nn.Module):
    """down, ReLU, up; zero at the start. float32 inside, (..., width) to (..., width)."""

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device, dtype=torch.float32)
        self.up = nn.Linear(size, width, device=device, dtype=torch.float32)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x.to(self.down.weight.dtype)))).to(x.dtype)


class _Places(nn.Module):
    """Which target layers have modules, and which of them holds its block's prefix; no tensors."""

    def __init__(self, layers: Sequence[LayerSpec], wanted: Sequence[int] | None) -> None:
        super().__init__()
        places = {spec.name: _place(spec.name) for spec in layers}
        depth: dict[str, int] = {}
        for stack, index in places.values():
            depth[stack] = max(depth.get(stack, 0), index + 1)
        first, total = {}, 0
        for stack, count in depth.items():
            first[stack], total = total, total + count
        if wanted is not None and (not wanted or max(wanted) >= total):
            raise ModelError(f"bottleneck: `layers` is {list(wanted)}; the blocks are numbered 0 to {total - 1}")
        self.on = {n for n, (stack, i) in places.items() if wanted is None or first[stack] + i in wanted}
        self.leads = set({place: name for name, place in reversed(places.items())}.values())


class _Restore:
    """Gives a model its attention function back once nothing is plugged into it any more."""

    def __init__(self, model: nn.Module, before: str | None) -> None:
        self.model, self.before = model, before

    def remove(self) -> None:
        """Does nothing while another adapter is plugged in."""
        if self.before not in (None, attend.NAME) and not any(m.__dict__.get("tunesmith_plugs") for m in self._all()):
            self.model.set_attn_implementation(self.before)

    def _all(self) -> Iterable[nn.Module]:
        return self.model.modules()


@part(paper="arXiv:2301.12132")
class Bottleneck(Adapter):
    """The modules of one block, held by its feed-forward output layer; none of them can be merged.

    Args:
        layer: A block's feed-forward output layer.
        serial: Size of the bottleneck after the feed-forward output; 0 is off.
        parallel: Size of the bottleneck beside the feed-forward; 0 is off.
        prefix: Learned keys and values before those of the block's self-attention; 0 is off.
        layers: Numbers of the blocks that have modules, from 0 on, an encoder's before its decoder's; None is all.
        scale: s, of the parallel bottleneck (4 in He et al.).
    """

    neutral: ClassVar[Mapping[str, object]] = {"prefix": 0}
    looks = False
    places: _Places | None = None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        serial: NonNegativeInt = 64,
        parallel: NonNegativeInt = 0,
        prefix: NonNegativeInt = 0,
        layers: list[NonNegativeInt] | None = None,
        scale: PositiveFloat = 4.0,
    ) -> None:
        super().__init__(layer)
        if not serial and not parallel and not prefix:
            raise ModelError("bottleneck: serial, parallel and prefix are all 0; give at least one of them a size")
        width, device = layer.out_features, layer.device
        self.scale, self.length = scale, prefix
        self.serial = _Narrow(width, serial, device) if serial else None
        self.parallel = _Narrow(width, parallel, device) if parallel else None
        # (2, P, width of keys), keys first. `wire` gives it another width where the model's keys have one.
        self.prefix = self._started(width) if prefix else None
        self.before_what: str | None = None
        self._taken: Tensor | None = None

    def _started(self, keys: int) -> nn.Parameter:
        made = torch.zeros(2, self.length, keys, device=self.layer.device)
        nn.init.normal_(made[0], std=keys**-0.5)
        return nn.Parameter(made)

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        """Rows laid end to end, if there is a prefix."""
        reason = "a prefix stands before the keys of each row, and rows laid end to end have no room for it"
        return {"padding-free": reason} if options.get("prefix") else {}

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """The output layer of every block's feed-forward."""
        names = block_linears(model)
        kinds = roles_from_names(f"{name}.weight" for name in names)
        return [name for name in names if kinds[f"{name}.weight"].kind == "down"]

    @classmethod
    def share(cls, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module | None:
        return _Places(layers, options["layers"])

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        """Drop what does not stand in this layer."""
        if isinstance(shared, _Places):
            self.__dict__["places"] = shared
            on = self.layer.name in shared.on
            self.serial, self.parallel = (self.serial, self.parallel) if on else (None, None)
            self.prefix = self.prefix if on and self.layer.name in shared.leads else None

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        """Look at the feed-forward's input, and stand before the block's attention.

        Raises:
            ModelError: the layer is no feed-forward output, or the block's other layers cannot be told.
        """
        handles: list[Handle] = []
        if self.parallel is not None:
            source = _source(model, path)
            if (found := spec_of(model.get_submodule(source), source).shape[1]) != self.layer.out_features:
                raise ModelError(
                    f"bottleneck: {source!r} reads {found} numbers and {path!r} gives {self.layer.out_features}; a "
                    "parallel bottleneck needs a feed-forward as wide at both ends: set parallel=0"
                )
            self.before_what = source
            handles.append(model.get_submodule(source).register_forward_pre_hook(self._take))
        if self.prefix is not None:
            attention, keys = _attention(model, path)
            if keys != self.prefix.shape[-1]:
                trains = self.prefix.requires_grad  # as PEFT has it: not if the adapter is loaded to be used
                self.prefix = self._started(keys)
                self.prefix.requires_grad_(trains)
            before = attend.enable(model)
            handles += [attend.plug(model.get_submodule(attention), self), _Restore(model, self._plain(before))]
        return handles

    def _plain(self, before: str | None) -> str | None:
        """What the attention was called before the first layer of this adapter was wired."""
        return before if self.places is None else self.places.__dict__.setdefault("attention", before)

    def _take(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self.switched_on():
            self._taken = given[0]

    def before(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """The prefix for `core.attend`, (1, key heads, P, dim) each."""
        if self.prefix is None or not self.switched_on():
            return None
        made = self.prefix.view(2, self.length, key.shape[1], key.shape[3]).transpose(1, 2)
        return made[:1], made[1:]

    def look(self, probabilities: Tensor) -> None:
        """Not asked for."""

    def forward(self, x: Tensor, below: Below) -> Tensor:
        f = below(x)
        out = f
        if self.serial is not None:
            out = out + self.serial(f)
        if self.parallel is not None:
            taken, self._taken = self._taken, None
            if taken is None:
                raise ModelError(
                    f"bottleneck on {self.layer.name!r} did not see the input of "
                    f"{self.before_what or 'the feed-forward, which it was not wired to'}: give the adapter to "
                    "get_peft_model, in one stack with others on that layer (tunesmith.stack)"
                )
            out = out + (self.scale * self.parallel(taken)).to(f.dtype)
        return out

    def weight(self, W: Tensor) -> Tensor:
        if reason := self.unmergeable():
            raise ModelError(f"Bottleneck on {self.layer.name!r} is no change of a weight: {reason}")
        return W

    def unmergeable(self) -> str | None:
        """Why it cannot be folded into the layer, where it has modules."""
        if self.serial is None and self.parallel is None and self.prefix is None:
            return None
        return "bottlenecks are not linear and a prefix is context; keep the adapter folder beside the model"


def _place(name: str) -> Place:
    """The stack and block of a layer, from its name: the first number in it."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit() and i > 0), None)
    return (name, 0) if at is None else (".".join(words[:at]), int(words[at]))


def _layers(model: nn.Module, path: str) -> dict[str, str]:
    """The roles of the layers in the block of `path`, in the model's order, by path."""
    stack, index = _place(path)
    block = f"{stack}.{index}."
    names = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(block) and name.endswith(".weight") and "tunesmith_" not in name
    ]
    kinds = roles_from_names(names)
    return {n.removesuffix(".weight").removesuffix(".base_layer"): kinds[n].kind for n in names}


def _source(model: nn.Module, path: str) -> str:
    """The first layer of the feed-forward whose last one stands at `path`."""
    kinds = _layers(model, path)
    words = path.split(".")

    def shared(other: str) -> int:
        same = [a == b for a, b in zip(words, other.split("."), strict=False)]
        return (*same, False).index(False)

    first = [name for name, kind in kinds.items() if kind in ("up", "gate")]
    if kinds.get(path) != "down" or not first:
        raise ModelError(
            f"bottleneck: {path!r} is not the last of a block's feed-forward layers whose first can be told (found "
            f"{first or 'none'}); leave `target_modules` out, or set parallel=0"
        )
    return max(first, key=shared)


def _attention(model: nn.Module, path: str) -> tuple[str, int]:
    """The module of the first attention in the block of `path`, and the width of its keys."""
    kinds = _layers(model, path)
    name = next((n for n, kind in kinds.items() if kind in ("k", "qkv")), None)
    out = next((n for n, kind in kinds.items() if kind == "o"), None)
    if name is None or (kinds[name] == "qkv" and out is None):
        raise ModelError(f"bottleneck: no keys of an attention were found in the block of {path!r}; set prefix=0")
    width = spec_of(model.get_submodule(name), name).out_features
    if kinds[name] == "qkv":
        width = (width - spec_of(model.get_submodule(str(out)), str(out)).shape[1]) // 2
    return name.rpartition(".")[0], width
