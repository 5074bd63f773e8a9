"""What comes after a training with `polarization-subnet`: whether inputs agree, what is open, and the smaller model.

report = calibrate(model, batches)
smaller = cut(model)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from tunesmith.adapters.polarization_subnet import PolarizationSubnet
from tunesmith.adapters.polarization_units import Plan
from tunesmith.core.report import Figure, Report, Table
from tunesmith.core.steps import in_force
from tunesmith.core.surgery import Structure, prune
from tunesmith.errors import ModelError


def _held(model: nn.Module) -> list[PolarizationSubnet]:
    held = [made for made in in_force(model) if isinstance(made, PolarizationSubnet) and made.gates is not None]
    if not held:
        raise ModelError("there is no polarization-subnet in force on this model")
    return held


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Report:
    """Set p to the mean of each gate over some batches, without dropout, and say how far inputs agree.

    Args:
        model: With the adapter, trained.
        batches: Keyword arguments of the model.

    Raises:
        ModelError: the adapter is not there, or no batch.
    """
    held, was = _held(model), model.training
    model.eval()
    for made in held:
        made.by_input, made._sum, made._count = True, 0.0, 0
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(was)
        for made in held:
            made.by_input, made.seen = False, None
    if not all(made._count for made in held):
        raise ModelError("calibrate: no batch reached the gates; give one at least")
    for made in held:
        made.p.copy_(made.p * 0 + made._sum / made._count)
    return summary(model)


def summary(model: nn.Module) -> Report:
    """What is open: units of each layer, their share of the FLOPs, and the mean of max(p, 1 - p) over the units."""
    held = _held(model)
    p, kept = torch.cat([made.p for made in held]), [made.consensus() for made in held]
    table = Table("open units", ["layer", "units", "open"], units=["", "count", "count"])
    table.rows = [[m.layer.name, len(g), int(g.sum())] for m, g in zip(held, kept, strict=True)]
    paid = sum(float((made.costs * g).sum()) for made, g in zip(held, kept, strict=True))
    figures: dict[str, Any] = {
        "agreement": Figure(float(torch.maximum(p, 1 - p).mean()), unit="share", better="higher"),
        "units open": Figure(int(sum(float(g.sum()) for g in kept)), unit="count", of=len(p)),
        "FLOPs left": Figure(paid / sum(float(made.costs.sum()) for made in held), unit="share", help="Of the units."),
    }
    return Report("polarization-subnet", figures=figures, tables=[table])


def cut(model: Any) -> Any:
    """The plain, smaller model: what is above the weights folded in, closed units taken out; `model` is used up.

    Raises:
        ModelError: the adapter is not there, or the base is quantised (load it dequantised).
    """
    kept: dict[str, dict[str, list[int]]] = {"heads": {}, "neurons": {}}
    for made in _held(model):
        site = cast(Plan, made.shared).sites[made.layer.name]
        size = site.size if site.kind == "heads" else 1
        kept[site.kind][site.output] = made.consensus()[made.unit_of][::size].nonzero()[:, 0].tolist()
    return prune(model.merge_and_unload(), Structure(kept["heads"], kept["neurons"]))
