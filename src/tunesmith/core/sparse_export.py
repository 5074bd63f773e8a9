"""Adapters of few entries as a sparse delta on the original weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.core.adapter import Base, Below, Changed
from tunesmith.core.bridge import TunesmithConfig
from tunesmith.core.entries import Entries, digest, index_dtype
from tunesmith.core.sparse import SparseDelta
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError


def sparse_delta(model: nn.Module, adapter_name: str = "default") -> SparseDelta:
    """The change that an adapter makes, by the names and in the layout of the base's state dict.

    Args:
        model: A PEFT model with an adapter of ours, its base not quantised. Several such parts on one layer add up.
        adapter_name: Which adapter.

    Raises:
        ModelError: the adapter is not ours, or changes a layer in more than few entries; or the base is quantised.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, TunesmithConfig):
        raise ModelError(f"the adapter {adapter_name!r} is not one of Tunesmith's; there is nothing to convert")
    entries: dict[str, Entries] = {}
    base: dict[str, int] = {}
    for layer in [m for m in model.modules() if isinstance(m, TunesmithLayer)]:
        if adapter_name not in layer.tunesmith_adapters:
            continue
        found = _of_layer(layer, adapter_name, config)
        if len(found):
            name = f"{layer.spec.name}.weight"
            stored: Tensor = layer.get_base_layer().weight
            entries[name], base[name] = found, digest(stored)
    marker = f".modules_to_save.{adapter_name}."
    whole = {
        name.removeprefix("base_model.model.").replace(marker, "."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if marker in name
    }
    about: dict[str, Any] = {"parts": [entry["name"] for entry in config.parts]}
    return SparseDelta(entries, base, whole, about)


@torch.no_grad()
def _of_layer(layer: TunesmithLayer, adapter_name: str, config: TunesmithConfig) -> Entries:
    spec, module = layer.spec, layer.get_base_layer()
    if spec.quantized:
        raise ModelError(
            f"the weight of {spec.name!r} is quantised, and a delta is relative to numbers: export merged weights "
            "(`tunesmith export --as merged`) and extract the delta from those"
        )
    size = torch.Size(spec.shape).numel()
    total: Tensor | None = None
    places = torch.empty(0, dtype=torch.int64)
    below: Below = Base(module, spec)
    for made in layer.tunesmith_adapters[adapter_name]:
        found = made.sparse(below.weight)
        below = Changed(made, below)
        if found is None:
            slugs = " + ".join(entry["name"] for entry in config.parts)
            raise ModelError(
                f"{slugs} changes more than few entries of {spec.name!r}; export merged weights (`tunesmith export "
                "--as merged`) and extract the delta from those"
            )
        indices, values = (t.detach().cpu() for t in found)
        total = torch.zeros(size) if total is None else total
        total.index_add_(0, indices.long(), values.float())
        places = torch.cat([places, indices.long()]).unique()
    assert total is not None
    values = total[places]
    shape = spec.shape
    if isinstance(module, Conv1D):  # stored as (in, out)
        out, fan_in = spec.shape
        places = places % fan_in * out + places // fan_in
        order = places.argsort()
        places, values, shape = places[order], values[order], (fan_in, out)
    return Entries(tuple(shape), places.to(index_dtype(size)), values)
