"""Running the parts of the room `data` on a run's training rows, with the run's own model at their service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tunesmith.core.part import Use
from tunesmith.errors import DataError
from tunesmith.inputs import Gathered
from tunesmith.recipe import Recipe


def apply(gathered: Gathered, uses: Sequence[Use], recipe: Recipe, base: nn.Module, processor: Any) -> Gathered:
    """The rows with every part of `data.select` applied, in order."""
    for use in uses:
        rows = gathered.train.dataset
        chosen = use.part.target(rows, services(recipe, base, processor, gathered), **use.options)
        if not len(chosen):
            raise DataError(f"data.select: {use.part.slug} left no training row")
        gathered.report.setdefault("selected", []).append({"part": use.part.slug, "from": len(rows), "to": len(chosen)})
        gathered = replace(gathered, train=replace(gathered.train, dataset=chosen))
    return gathered


def services(recipe: Recipe, base: nn.Module, processor: Any, gathered: Gathered) -> Any:
    """What a part may ask of the model."""
    from tunesmith.engine.services import ModelServices

    return ModelServices(recipe, base, processor, gathered).offered()
