"""A layer of a model with our adapters and prompts around it: what `core.bridge` injects."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.core import layer as layers
from tunesmith.core.adapter import Adapter, stacked
from tunesmith.core.prompt import Prompt
from tunesmith.errors import ModelError

PREFIX = "tunesmith_"


class TunesmithLayer(nn.Module, BaseTunerLayer):
    """A layer with any number of named stacks of adapters around it; the input embedding also holds the prompts.

    Attributes:
        factor: What the change of the output is multiplied by (`core.gates`).
    """

    adapter_layer_names = ("tunesmith_adapters", "tunesmith_prompts")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spec = layers.describe(self.get_base_layer(), name)
        self.tunesmith_adapters = nn.ModuleDict()
        self.tunesmith_prompts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._original: tuple[Tensor, Tensor | None] | None = None
        self.factor = 1.0

    def add(self, adapter_name: str, made: Adapter | Prompt) -> None:
        """Put one more part on top of the stack called `adapter_name`."""
        held = self.tunesmith_prompts if isinstance(made, Prompt) else self.tunesmith_adapters
        if isinstance(made, Adapter):
            made.switched_on = partial(self.uses, adapter_name)
        if adapter_name not in held:
            held[adapter_name] = nn.ModuleList()
        held[adapter_name].append(made)

    def uses(self, adapter_name: str) -> bool:
        """Whether the stack of that name is in force."""
        return not (self.disable_adapters or self.merged) and adapter_name in self.active_adapters

    def drop(self, adapter_name: str, made: Collection[Adapter]) -> None:
        """Take some parts off the stack called `adapter_name`."""
        if adapter_name not in self.tunesmith_adapters:
            return
        held = list(self.tunesmith_adapters[adapter_name])
        kept = [part for part in held if part not in made]
        if len(kept) < len(held):
            self.tunesmith_adapters.pop(adapter_name)
            for part in kept:
                self.add(adapter_name, part)

    def active(self) -> list[Adapter]:
        """The adapters in force, nearest to the base first."""
        return self._in_force(self.tunesmith_adapters)

    def active_prompts(self) -> list[Prompt]:
        """The prompts in force, in the order in which they stand before the input."""
        return [] if self.disable_adapters else self._in_force(self.tunesmith_prompts)

    def original_weight(self) -> Tensor:
        """The canonical weight as it was before anything was merged into it, detached."""
        base = self.get_base_layer()
        if self._original is None:
            return layers.read_weight(base, self.spec).detach()
        now = base.weight
        base.weight = self._original[0] if self.spec.quantized else nn.Parameter(self._original[0], False)
        try:
            return layers.read_weight(base, self.spec).detach()
        finally:
            base.weight = now

    def _in_force(self, held: nn.ModuleDict) -> list[Any]:
        names = [name for name in self.active_adapters if name in held]
        return [made for name in names for made in held[name]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else self.active()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.training:
            for made in adapters:
                _check_ready(made)
        out = stacked(self.get_base_layer(), self.spec, adapters)(x)
        if self.factor != 1.0:
            plain = self.base_layer(x, *args, **kwargs)
            out = plain + self.factor * (out - plain)
        if torch.is_autocast_enabled(x.device.type):
            return out
        return out.to(x.dtype if x.is_floating_point() else self.spec.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold stacks into the base weight; the original is kept aside so that `unmerge` restores it bit for bit.

        Raises:
            ModelError: an adapter cannot be merged, the merged weight is not finite (with `safe_merge`), or a layer
                cannot hold the bias that the merged method needs.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        for name in wanted:
            if name in self.tunesmith_prompts:
                raise ModelError(
                    f"the adapter {name!r} holds a prompt ({type(self.tunesmith_prompts[name][0]).__name__}), which is "
                    "context and cannot be merged into weights; keep the adapter folder beside the model"
                )
        names = [n for n in wanted if n in self.tunesmith_adapters and n not in self.merged_adapters]
        if not names:
            return
        base = self.get_base_layer()
        adapters = [made for name in names for made in self.tunesmith_adapters[name]]
        for made in adapters:
            reason = unmergeable(made)
            if reason:
                raise ModelError(f"{type(made).__name__} on {self.spec.name!r} cannot be merged: {reason}")
        with torch.no_grad():
            W = layers.read_weight(base, self.spec)
            b = getattr(base, "bias", None)
            if self._original is None:
                # Writing back a quantised weight makes a new parameter, so the old one itself can be kept.
                kept = base.weight if self.spec.quantized else base.weight.detach().clone()
                self._original = (kept, None if b is None else b.detach().clone())
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            b = None if b is None else b.detach().to(torch.float32)
            for made in adapters:
                W, b = made.weight(W), made.bias(b)
            if safe_merge and not (bool(W.isfinite().all()) and (b is None or bool(b.isfinite().all()))):
                raise ModelError(f"merging {names} into {self.spec.name!r} gives values that are not finite")
            layers.write(base, self.spec, W, b)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight and bias back, exactly."""
        if not self.merged or self._original is None:
            return
        base = self.get_base_layer()
        weight, bias = self._original
        with torch.no_grad():
            if self.spec.quantized:
                base.weight = weight
            else:
                base.weight.copy_(weight)
            if bias is None:
                base.bias = None
            else:
                base.bias.copy_(bias)
        self.merged_adapters.clear()
        self._original = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        if adapter_name not in self.tunesmith_adapters:
            return False
        held = list(self.tunesmith_adapters[adapter_name])
        return len(held) == 1 and held[0].to_lora() is not None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' - W in the canonical shape, for PEFT's conversion of any tuner to LoRA."""
        W = layers.read_weight(self.get_base_layer(), self.spec)
        changed = stacked(self.get_base_layer(), self.spec, list(self.tunesmith_adapters[adapter_name]))
        return changed.weight - W


def _check_ready(made: Adapter) -> None:
    where = f"{type(made).__name__} on {made.layer.name!r}"
    if made.statistics and not made.prepared:
        raise ModelError(
            f"{where} starts from statistics of the data: call `tunesmith.initialise(model, batches)` before training"
        )
    if made.has_steps and not made.stepping:
        raise ModelError(
            f"{where} does something at every optimizer step: give the Trainer `callbacks=tunesmith.callbacks(model)`, "
            "or write `with tunesmith.step(model, n):` around each step of your own loop"
        )


def unmergeable(made: Adapter) -> str | None:
    """Why an adapter cannot be folded into its layer; None if it can."""
    probe = getattr(made, "unmergeable", None)
    return probe() if probe else None
