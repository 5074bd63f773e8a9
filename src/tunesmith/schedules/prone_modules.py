"""Prone modules: only the tensors that a change of task moves most train; running statistics of the others rest too.

Zhao, Zhou, Long, Jiang and Zhang, "Does Continual Learning Equally Forget All Parameters?", ICML 2023: normalisation
layers and the last layer forget first, and the first layer where the domain of the inputs changes. Fine-tuning only
these on a small buffer at the end ("FPF") brings back most of what was forgotten.

    theta_l <- theta_l - eta * gradient    for l in the chosen groups, nothing else moves, statistics included

A group is of one role: `first`, `last`, `norm.weight`, `norm.bias`, `norm.mean` and `norm.var` (running statistics),
and of what is left one per block, such as `conv.0`, `q.3` or `down.3`. The recipe `fpf` measures which to choose.

A normalisation layer whose statistics rest runs as in evaluation, by its running statistics; one whose statistics are
chosen runs in training mode and updates them from the batches, whether or not its factor and shift train. If only one
of mean and variance is chosen, the other is put back after each batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from tunesmith.core.layer import kind_of
from tunesmith.core.modelmap import Role, roles
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.errors import ModelError, TunesmithError

DEFAULT = ("norm", "last")
_STATISTICS = {"running_mean": "norm.mean", "running_var": "norm.var"}


def tracking(model: nn.Module) -> dict[str, _NormBase]:
    """Layers with running statistics, by name: batch normalisation, and instance normalisation that tracks."""
    every = {n: m for n, m in model.named_modules() if isinstance(m, _NormBase)}
    return {name: module for name, module in every.items() if module.running_mean is not None}


def groups(model: nn.Module, names: Collection[str] | None = None) -> dict[str, list[str]]:
    """Every parameter and running statistic in one group of its role, `{label: names}`.

    `last` is the output head; where none of it is among `names`, the last layer that is (in the order of
    `named_parameters`). `first` is the input embedding (patches, tokens), or the first layer of a model without one. A
    head that is tied to the embedding is `last`, and there is no `first`.

    Args:
        model: Any, with or without numbered blocks.
        names: The parameters to put into groups; those that train if not given, or all where none does.

    Raises:
        ModelError: there is no parameter.
    """
    every = dict(model.named_parameters())
    if names is None:
        names = [n for n, p in every.items() if p.requires_grad] or list(every)
    whole, wanted = roles(model), set(names)
    kinds = {name: role for name, role in whole.items() if name in wanted}
    if not kinds:
        raise ModelError(f"{type(model).__name__} has no parameters to put into groups")
    found: dict[str, list[str]] = {}
    last = _last(model, kinds)
    first = _first(model, whole, last)
    stacks = list(dict.fromkeys(role.depth.stack for role in kinds.values() if role.depth))
    for name, role in kinds.items():
        label = "first" if name in first else "last" if name in last else _label(model, name, role, stacks)
        found.setdefault(label, []).append(name)
    for name in tracking(model):
        for buffer, label in _STATISTICS.items():
            found.setdefault(label, []).append(f"{name}.{buffer}")
    return found


def _last(model: nn.Module, kinds: Mapping[str, Role]) -> set[str]:
    try:
        outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    except RuntimeError:  # models of several towers (CLIP) have no single one
        outputs = None
    held = {id(p) for p in outputs.parameters()} if isinstance(outputs, nn.Module) else set()
    own = {n for n, p in model.named_parameters() if id(p) in held} | {n for n, r in kinds.items() if r.kind == "head"}
    own &= kinds.keys()
    if own:
        return own
    layers = [n for n, role in kinds.items() if role.kind != "norm"]
    return {n for n in layers if _layer(model, n) == _layer(model, layers[-1])} if layers else set()


def _first(model: nn.Module, kinds: Mapping[str, Role], last: set[str]) -> set[str]:
    """The input embedding; the first layer of a model without one. None where the embedding is the head as well."""
    embedded = {n for n, role in kinds.items() if role.kind == "embedding"}
    layers = [n for n, role in kinds.items() if role.kind != "norm" and n not in last]
    inside = any("lora_" in n or "tunesmith_" in n for n in layers)
    if embedded or not layers or inside or any(role.kind == "position" for role in kinds.values()):
        return embedded - last
    return {n for n in layers if _layer(model, n) == _layer(model, layers[0])}


def _layer(model: nn.Module, name: str) -> str:
    """The layer of a parameter, whose adapters belong to it."""
    words = name.split(".")
    for i in range(1, len(words)):
        if hasattr(model.get_submodule(".".join(words[:i])), "base_layer"):
            return ".".join(words[:i])
    return ".".join(words[:-1])


def _label(model: nn.Module, name: str, role: Role, stacks: list[str]) -> str:
    if role.kind == "norm":
        return "norm.bias" if role.bias else "norm.weight"
    kind = role.kind
    if kind == "other" and kind_of(model.get_submodule(name.rpartition(".")[0])) == "conv":
        kind = "conv"
    if role.depth is None:
        return kind
    stack = "" if len(stacks) == 1 else f".{role.depth.stack}"
    return f"{kind}{stack}.{role.depth.index}"


def pick(found: Mapping[str, list[str]], modules: Iterable[str]) -> set[str]:
    """Names of all tensors of some groups.

    Args:
        found: From `groups`.
        modules: Labels or their beginnings: `norm` is all four of `norm.weight`, ..., `q` the groups `q.0`, `q.1`, ...

    Raises:
        TunesmithError: an entry means no group.
    """
    chosen: set[str] = set()
    for module in modules:
        meant = [label for label in found if f"{label}.".startswith(f"{module}.")]
        if not meant:
            raise TunesmithError(f"there is no group {module!r}; the model has {', '.join(sorted(found))}")
        chosen.update(name for label in meant for name in found[label])
    return chosen


@part(
    paper="arXiv:2304.04158",
    refuses={"fsdp": "what trains of a sharded weight is settled before the run begins"},
)
class ProneModules(Schedule):
    """Trains groups of tensors by their role, for the whole run, and keeps the statistics of all others.

    Args:
        modules: Labels of groups or their beginnings, such as `norm`, `last`, `first`, `norm.bias`, `q`, `down.3`. Not
            given: normalisation layers with their statistics, where there are any, and the last layer.
    """

    def __init__(self, *, modules: list[str] | None = None) -> None:
        super().__init__()
        self.modules = modules
        self.groups: dict[str, list[str]] = {}
        """All groups of what trains, and of running statistics."""
        self.chosen: frozenset[str] = frozenset()
        """Names of the parameters and statistics that may change."""
        self._handles: list[RemovableHandle] = []
        self._held: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}

    def on_attach(self) -> None:
        """Find the groups, and hold the statistics that rest.

        Raises:
            TunesmithError: there is no such group, or no parameter in those that are.
        """
        assert self.model is not None
        self._release()
        self.groups = groups(self.model, list(self.eligible))
        modules = self.modules
        if modules is None:
            modules = [m for m in DEFAULT if any(f"{label}.".startswith(f"{m}.") for label in self.groups)]
        self.chosen = frozenset(pick(self.groups, modules))
        if self.eligible and not self.chosen & self.eligible.keys():
            raise TunesmithError(
                f"prone-modules: no parameter is in {', '.join(modules)}, running statistics at most; to renew these "
                "alone, run the model forward in training mode"
            )
        for name, module in tracking(self.model).items():
            resting = tuple(b for b in _STATISTICS if f"{name}.{b}" not in self.chosen)
            if resting:
                before, after = partial(self._before, resting), self._after
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after, always_call=True))

    def _before(self, resting: tuple[str, ...], module: nn.Module, _: Any) -> None:
        # In the pass itself: a Trainer calls `model.train()` after a schedule has begun its step.
        if not module.training:
            return
        if len(resting) == len(_STATISTICS):
            self._held[id(module)] = [(module.__dict__, "training", True)]
            module.training = False
            return
        held: list[tuple[dict[str, Any], str, Any]] = []
        for name in resting:
            kept: Tensor = module._buffers[name]  # type: ignore[assignment]
            # Another tensor for the pass: one that is written back would look to autograd as changed.
            held.append((module._buffers, name, kept))
            module._buffers[name] = kept.clone()
        self._held[id(module)] = held

    def _after(self, module: nn.Module, *_: Any) -> None:
        for place, name, value in self._held.pop(id(module), []):
            place[name] = value

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def active(self, step: int) -> Collection[str]:
        return self.chosen & self.eligible.keys()

    def detach(self) -> None:
        """Let everything train again, statistics included."""
        self._release()
        super().detach()
