"""The adapter contract: how one layer changes.

An adapter is a module made from the layer that it changes; it never owns the layer's weight. `weight(W) -> W'` is the
whole method. Everything PEFT offers follows from it (`core.bridge`). A cheaper `forward` is an optimisation that must
agree with it.

The frozen weight is never modified while an adapter is attached. A method whose paper starts from a changed weight,
W0 = W - s B0 A0 say, keeps its starting factors as buffers and computes the difference from them. Disabling such an
adapter therefore gives the original model exactly, and two such adapters can live on one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.core import layer as layers
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import block_linears
from tunesmith.errors import ModelError

Statistics = Mapping[str, Tensor]
"""What one pass over the data says of one layer; see `core.stats.STATISTICS` for names and shapes."""


class Below(Protocol):
    """What an adapter sees of the layer under it, with the adapters under it already applied."""

    @property
    def spec(self) -> LayerSpec: ...

    @property
    def weight(self) -> Tensor:
        """The canonical weight; costs a dequantisation on a quantised layer."""

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for `x`."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation on `x` with another weight and bias."""


class Adapter(nn.Module):
    """A change of one frozen layer.

    Trainable tensors are parameters; whatever else must be saved is a persistent buffer. At creation the output must
    equal the base's, or the class documents its start.

    Attributes:
        kinds: Of layer that the method can change.
        statistics: Names of what `prepare` wants; see `core.stats`. A method that wants any cannot train before
            `tunesmith.initialise` was called.
        neutral: Options under which the output at creation equals the base's; empty if the defaults are such.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    statistics: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, object]] = {}

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        if layer.kind not in self.kinds:
            raise ModelError(
                f"{type(self).__name__} changes {' and '.join(sorted(self.kinds))} layers; {layer.name!r} is a "
                f"{layer.kind} layer. Leave it out of `target_modules`."
            )
        self.layer = layer
        self.stepping = False
        if self.statistics:
            self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))

    @property
    def has_steps(self) -> bool:
        """Whether the method does something at every optimizer step."""
        return type(self).begin_step is not Adapter.begin_step

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Names of the layers changed when the user names none: every linear layer inside the blocks."""
        return block_linears(model)

    def weight(self, W: Tensor) -> Tensor:
        """The changed weight, differentiable, in the canonical shape of `core.layer`."""
        raise TypeError(f"{type(self).__name__} does not define weight(W)")

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The changed bias; (out,) or None."""
        return b

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """The layer's output with this change; override where a cheaper way than `weight` exists."""
        return below.apply(x, self.weight(below.weight), self.bias(below.bias))

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        """Initialise from the frozen canonical weight and this layer's statistics (`statistics` names which)."""

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step (not before each micro-batch), if the method overrides it.

        `tunesmith.callbacks(model)` does so in a Trainer, `with tunesmith.step(model, n):` in a loop of one's own.
        What is drawn here is drawn from the step's number (`core.seeds`), so that processes and resumed runs agree.
        """

    def end_step(self) -> None:
        """Called after each optimizer step, if the method overrides `begin_step`."""

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        """(B, A) with W' = W + B A relative to the ORIGINAL weight, (out, r) and (r, in); None if not low rank."""
        return None

    def trainable_count(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        return f"{self.layer.kind} {tuple(self.layer.shape)}"


class Base:
    """The frozen layer itself, as an adapter sees it."""

    def __init__(self, module: nn.Module, spec: LayerSpec) -> None:
        self.module = module
        self.spec = spec

    @property
    def weight(self) -> Tensor:
        return layers.read_weight(self.module, self.spec)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return layers.apply(self.module, self.spec, x, weight, bias)


class Changed:
    """A layer with one adapter applied, as the adapter above it sees it."""

    def __init__(self, adapter: Adapter, below: Below) -> None:
        self.adapter = adapter
        self.below = below
        self.spec = below.spec

    @property
    def weight(self) -> Tensor:
        return self.adapter.weight(self.below.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.below.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.below)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.below.apply(x, weight, bias)


def stacked(module: nn.Module, spec: LayerSpec, adapters: Iterable[Adapter]) -> Below:
    """The layer with `adapters` applied in order, the first nearest to the base."""
    below: Below = Base(module, spec)
    for adapter in adapters:
        below = Changed(adapter, below)
    return below


A = TypeVar("A", bound=Adapter)


def each_adapter(model: nn.Module, visit: Callable[[A], None], kind: type[A] = Adapter) -> int:  # type: ignore[assignment]
    """Call `visit` on every adapter of a type in the model; returns how many there were.

    The way for a schedule or callback to tell all layers something, such as the rank of this step.
    """
    found = [m for m in model.modules() if isinstance(m, kind)]
    for adapter in found:
        visit(adapter)
    return len(found)
