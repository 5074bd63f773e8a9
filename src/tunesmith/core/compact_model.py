"""Compressing what autograd keeps of a whole model.

    compaction = Compaction(model)       # from now on every forward pass that is to be differentiated keeps less
    ...
    compaction.remove()                  # exactly as before

`core/compact_mode.py` is on inside the model's blocks and the modules beside them. Two kinds of module are written out
in small steps and are done at once instead: RMS norms and some GELUs. All of this hangs on subclasses that the modules
get for the time: it follows copies of the model and replicas, and holds when a block is computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from tunesmith.core.compact_mode import Compact, Settings
from tunesmith.core.layer import kind_of
from tunesmith.core.modelmap import blocks
from tunesmith.errors import ModelError

Whole = Callable[[Compact, Callable[[Tensor], Tensor], Any, Tensor], Tensor | None]
"""What does a module at once: the mode, the module's own forward, the module and its input."""


class Compaction:
    """Compresses what a model keeps, until it is removed."""

    def __init__(self, model: nn.Module, settings: Settings | None = None) -> None:
        self._mode = mode = Compact(settings or Settings())
        self._undo: list[Callable[[], None]] = []
        for module in list(model.modules()):
            whole, own = _whole(module), vars(module).get("forward")
            if whole is not None and own is None:
                self._replace(module, _at_once(type(module).forward, whole, mode))
            elif whole is not None:
                held = _at_once(functools.partial(_without_self, own), whole, mode)
                self._replace(module, functools.partial(held, module))
        # transformers recomputes a block by the `forward` of its class, without hooks: that is where this must stand.
        for scope in _scopes(model):
            self._replace(scope, _inside(vars(scope).get("forward", type(scope).forward), mode))

    def _replace(self, module: nn.Module, forward: Any) -> None:
        """Give a module another forward by its class, so that copies and replicas of it have one of their own."""
        plain, own = type(module), vars(module).get("forward")
        if own is not None:  # accelerate puts one on the module itself, which hides that of the class
            module.forward = forward
            self._undo.append(lambda: setattr(module, "forward", own))
            return
        members = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
        module.__class__ = type(plain.__name__, (plain,), members)
        self._undo.append(lambda: setattr(module, "__class__", plain))

    def remove(self) -> None:
        """Take it all off."""
        for undo in reversed(self._undo):
            undo()
        self._undo, self._mode.enabled = [], False


def _without_self(forward: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _inside(forward: Any, mode: Compact) -> Any:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode.scope():
            return forward(*args, **kwargs)

    return inside


def _at_once(forward: Any, whole: Whole, mode: Compact) -> Any:
    @functools.wraps(forward)
    def at_once(self: Any, *args: Any, **named: Any) -> Any:
        def plain(given: Tensor) -> Any:
            return forward(self, given, *args[1:], **named)

        compressed = whole(mode, plain, self, args[0]) if args and mode.wanted else None
        return forward(self, *args, **named) if compressed is None else compressed

    return at_once


def _scopes(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks, and the largest modules that hold none; no two share a module."""
    try:
        inner = {id(block) for stack in blocks(model).values() for block in stack}
    except ModelError:
        inner = {id(model)}
    outer = {id(m) for m in model.modules() if id(m) not in inner and any(id(n) in inner for n in m.modules())}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in outer or isinstance(module, nn.ModuleList | nn.ModuleDict):  # lists are never called
            for child in module.children():
                yield from walk(child)
        else:
            yield module

    return iter({id(module): module for module in walk(model)}.values())


def _whole(module: nn.Module) -> Whole | None:
    """How a module that is written out in steps is done at once; None for any other."""
    if isinstance(module, _GELUS):
        return lambda mode, plain, _, x: mode.activate(plain, x)
    found = _rms(module)
    if found is None:
        return None
    eps, offset = found

    def norm(mode: Compact, plain: Callable[[Tensor], Tensor], module: Any, x: Tensor) -> Tensor | None:
        return mode.norm(lambda: plain(x), x, module.weight, None, False, offset, eps, 1)

    return norm


_GELUS = (
    activations.GELUActivation,
    activations.GELUTanh,
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.QuickGELUActivation,
    activations.AccurateGELUActivation,
)


@torch.no_grad()
def _rms(module: nn.Module) -> tuple[float, float] | None:
    """Epsilon, and what is added to the weight, of an RMS norm, found by what it computes; None if it is another."""
    weight: Any = getattr(module, "weight", None)
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm)  # one operation already
    if known or kind_of(module) != "norm" or not isinstance(eps, float) or weight.is_meta:
        return None
    if getattr(module, "bias", None) is not None:
        return None
    x = torch.linspace(-2, 1, 2 * weight.numel(), device=weight.device, dtype=weight.dtype).view(2, -1)
    try:
        y = type(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError):
        return None  # it takes something else than rows, so it is none
    unit = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    close = 1e-4 if weight.dtype == torch.float32 else 0.03
    for offset in (0.0, 1.0):
        if torch.allclose(y.float(), unit * (weight.float() + offset), rtol=close, atol=close):
            return eps, offset
    return None
