"""The original model, as a function, while adapters are on it: the reference that some objectives compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from tunesmith.errors import ModelError

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of PEFT's LoRA that subtract from the frozen weight: switching the adapter off is not the original then."""


@contextmanager
def reference(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes what the base computed before anything was put on it, without gradients.

    `modules_to_save` (a new classification head, say) are off as well: the base's own module answers. Training mode is
    evaluation mode inside.

    Raises:
        ModelError: no adapter is on the model, so that the original weights are gone; or the adapter changes the base.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, PeftModel):
        raise ModelError(
            f"a reference is the model with its adapters switched off; {type(inner).__name__} has none, and its own "
            "weights train. Name an adapter."
        )
    for name in inner.active_adapters:
        start = getattr(inner.peft_config[name], "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise ModelError(
                f"the adapter {name!r} started by `init_lora_weights={start!r}`, which changes the frozen weights: "
                "without it the model is not the original. Take the part of that name (`pissa`, `corda`, `lora-ga`)."
            )
    was = {module: module.training for module in inner.modules()}
    # PEFT lets every parameter of an adapter train when it is switched on again, also those that a schedule froze.
    frozen = [p for p in inner.parameters() if not p.requires_grad]
    inner.eval()
    try:
        with torch.no_grad(), inner.disable_adapter():
            yield inner
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, training in was.items():
            module.training = training
