"""The adapter contract: how one layer changes.

An adapter is a module made from the layer that it changes; it never owns the layer's weight. `weight(W) -> W'` is the
whole method. Everything PEFT offers follows from it (`core.bridge`). A cheaper `forward` is an optimisation that must
agree with it.

The frozen weight is never modified while an adapter is attached. A method whose paper starts from a changed weight,
W0 = W - s B0 A0 say, keeps its starting factors as buffers and computes the difference from them. Disabling such an
adapter therefore gives the original model exactly, and two such adapters can live on one model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.core import layer as layers
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import block_linears
from tunesmith.errors import ModelError, TunesmithError

Statistics = Mapping[str, Tensor]
"""What one pass over the data says of one layer; see `core.stats.STATISTICS` for names and shapes."""


class Handle(Protocol):
    """What takes a hook away again, such as torch's `RemovableHandle`."""

    def remove(self) -> None: ...


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


@dataclass(frozen=True)
class Step:
    """An optimizer step, as methods are told of it.

    Attributes:
        number: Counted from 0.
        total: Steps of the whole run; None where a loop of one's own did not say.
        optimizer: Of the run, for methods that move what it keeps of their parameters; None likewise.
    """

    number: int
    total: int | None = None
    optimizer: torch.optim.Optimizer | None = None

    def needs_total(self, who: str) -> int:
        """The total.

        Raises:
            TunesmithError: it is not known.
        """
        if self.total is None:
            raise TunesmithError(
                f"{who} follows a schedule over the whole run: write `with tunesmith.step(model, n, total=STEPS):`"
            )
        return self.total


class Adapter(nn.Module):
    """A change of one frozen layer.

    Trainable tensors are parameters; whatever else must be saved is a persistent buffer. At creation the output must
    equal the base's, or the class documents its start.

    Attributes:
        kinds: Of layer that the method can change.
        statistics: Names of what `prepare` wants; see `core.stats`. A method that wants any cannot train before
            `tunesmith.initialise` was called.
        neutral: Options under which the output at creation equals the base's; empty if the defaults are such.
        side: Names of what it wants to know of a batch beside the inputs (`core.side`), read as
            `self.side_context.get(name, rows)`. One that names `group` has an option `groups` and keeps it as an
            attribute: the names of the groups in order; a run fills it in from the rows' `family` column.
        brisk: Options under which what happens over steps happens within a few steps of a small model, for tests.
        group: Name of the PEFT adapter that it belongs to.
        switched_on: Whether the adapter is in force: active, not merged, not disabled.
        shared: What `share` made for all layers of one PEFT adapter; None if nothing. The adapter of the first layer
            owns it (its parameters are saved and counted there), the others refer to it.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    statistics: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, object]] = {}
    brisk: ClassVar[Mapping[str, object]] = {}
    side: ClassVar[tuple[str, ...]] = ()
    group: str = "default"
    shared: nn.Module | None
    side_context: Any = None
    switched_on: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        if layer.kind not in self.kinds:
            raise ModelError(
                f"{type(self).__name__} changes {' and '.join(sorted(self.kinds))} layers; {layer.name!r} is a "
                f"{layer.kind} layer. Leave it out of `target_modules`."
            )
        self.layer = layer
        self.shared = None
        self.stepping = False
        if self.statistics:
            self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))

    @property
    def has_steps(self) -> bool:
        """Whether the method does something at every optimizer step."""
        return any(
            name in vars(cls)
            for cls in type(self).__mro__[: type(self).__mro__.index(Adapter)]
            for name in ("begin_step", "end_step", "begin", "end")
        )

    @classmethod
    def share(cls, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module | None:
        """A module for all the layers that one PEFT adapter changes, made before they are: `self.shared` is it.

        Args:
            layers: In the order of the model.
            options: Of the part, checked.
        """
        return None

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module | None:
        """What `share` makes, for a method that must know the model as well: its heads, or weights to choose by.

        Args:
            model: The base, before any layer of this adapter is made.
            layers: As in `share`.
            options: As in `share`.
        """
        return cls.share(layers, options)

    def join(self, shared: nn.Module | None, owner: bool) -> None:
        """Called once after creation with what `survey` or `share` made; `owner` for the first layer. A parameter whose
        shape follows from it is made here."""
        if owner:
            self.shared = shared
        else:
            self.__dict__["shared"] = shared  # not a submodule: it is saved, moved and counted once

    @property
    def starts_from_weight(self) -> bool:
        """Whether `prepare` wants the frozen weight alone: it is then called when the adapter is attached."""
        return type(self).prepare is not Adapter.prepare and not self.statistics

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
        """Initialise from the frozen canonical weight and this layer's statistics (`statistics` names which).

        A method that names no statistics is prepared when it is attached, also before a saved adapter is loaded into
        it: what follows from the weight alone can be a buffer that is not saved. `W` is that of the base layer,
        whatever other adapters stand below, in the dtype that it is stored in; dequantised if it is codes.
        """

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        """Called once when the adapter is in its place: look at, or reach into, other modules than its layer.

        What is registered must do nothing while `self.switched_on()` is false. `core.attend` reaches into attention.

        Args:
            model: The base model, adapters included.
            path: Of the layer in it.

        Returns:
            What to `remove()` when the adapter is taken off.
        """
        return ()

    @classmethod
    def arrange(cls, adapters: Sequence[Self]) -> None:
        """Called once after `prepare` of every layer, with all of them: to share a budget among them, for instance.

        A `LowRank` may be resized here; one of rank 0 is taken off its layer.
        """

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        """Called before each optimizer step with all layers' adapters of one group, in the order of the model.

        Override it where a decision needs all layers, `begin_step` where each layer decides alone.
        """
        for made in adapters:
            made.begin_step(step.number)

    @classmethod
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        """Called after each optimizer step, likewise. The gradients of the step are still there: accumulated over its
        micro-batches, averaged over processes, clipped."""
        for made in adapters:
            made.end_step()

    def training_state(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond parameters and saved buffers; kept in checkpoints, not in the result."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `training_state` gave."""

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step (not before each micro-batch), if the method overrides it.

        `tunesmith.callbacks(model)` does so in a Trainer, `with tunesmith.step(model, n):` in a loop of one's own.
        What is drawn here is drawn from the step's number (`core.seeds`), so that processes and resumed runs agree.
        """

    def end_step(self) -> None:
        """Called after each optimizer step, if the method overrides `begin_step`."""

    def sparse(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """(indices, values): the change of the canonical weight `W` as few entries of it, flattened; values are added.
        None if it is not such."""
        return None

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        """(B, A) with W' = W + B A relative to the ORIGINAL weight, (out, r) and (r, in); None if not low rank."""
        return None

    def deploy(self, **choice: Any) -> None:
        """Settle what the adapter is used as from now on, in evaluation, merging and export, where it can be several.

        An override names what can be chosen as keyword-only parameters (`rank` of DyLoRA).

        Raises:
            TunesmithError: nothing of that name can be chosen, or not so.
        """
        raise TunesmithError(f"{type(self).__name__} is one thing only; there is nothing to choose")

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


def deploy(model: nn.Module, **choice: Any) -> int:
    """Settle what the adapters of a model are used as from now on, where they can be several: `deploy(model, rank=4)`.

    Returns:
        The number of adapters told.

    Raises:
        TunesmithError: no adapter knows the choice, or it is not possible for one of them.
    """

    def knows(made: Adapter) -> bool:
        known = inspect.signature(made.deploy).parameters
        return type(made).deploy is not Adapter.deploy and all(name in known for name in choice)

    told = [m for m in model.modules() if isinstance(m, Adapter) and knows(m)]
    if not told:
        possible = sorted(
            {
                name
                for m in model.modules()
                if isinstance(m, Adapter) and type(m).deploy is not Adapter.deploy
                for name in inspect.signature(m.deploy).parameters
            }
        )
        hint = f"; what can be chosen is {', '.join(possible)}" if possible else ""
        raise TunesmithError(f"no adapter of the model can be told {', '.join(choice)}{hint}")
    for made in told:
        made.deploy(**choice)
    return len(told)
