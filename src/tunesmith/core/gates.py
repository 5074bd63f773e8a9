"""The output of some layers' adapters scaled for a while: what a layer's adapter is worth, by turning it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError


def gated_layers(model: nn.Module) -> list[str]:
    """Names of the layers with adapters whose output can be scaled, in the order of the model.

    Raises:
        ModelError: a PEFT adapter is on the model whose output has no scale.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, TunesmithLayer) and not isinstance(getattr(module, "scaling", None), dict):
                raise ModelError(
                    f"the adapter on {name!r} ({type(module).__name__}) has no scale that could be turned down; take "
                    "`lora` or an adapter of ours"
                )
            found.append(name)
    return found


@contextmanager
def scaled(model: nn.Module, factors: Mapping[str, float]) -> Iterator[None]:
    """Inside the block a layer's output is y_base + f (y - y_base), f its factor; afterwards as before, bit for bit.

    Args:
        model: With adapters.
        factors: By layer name, as `gated_layers` gives them.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name, factor in factors.items():
            layer: Any = model.get_submodule(name)
            if isinstance(layer, TunesmithLayer):
                undo.append(partial(setattr, layer, "factor", layer.factor))
                layer.factor = factor
                continue
            undo.append(partial(layer.scaling.update, dict(layer.scaling)))
            for adapter in layer.active_adapters:
                if adapter in layer.scaling:
                    layer.scaling[adapter] *= factor
        yield
    finally:
        for restore in undo:
            restore()
