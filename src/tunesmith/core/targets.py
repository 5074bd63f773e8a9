"""Which layers of a model a part changes: names, patterns, defaults and rank tables resolved to full module names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tunesmith import catalog
from tunesmith.core import layer as layers
from tunesmith.core.adapter import Adapter
from tunesmith.core.tuner_layer import PREFIX, TunesmithLayer
from tunesmith.errors import ModelError, RecipeError


def resolve(cls: type, entry: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Full module names that one part changes.

    Raises:
        ModelError: a part matches no layer, or one that it cannot change.
    """
    names = {name: module for name, module in model.named_modules() if name and PREFIX not in name}
    wanted = entry["target_modules"]
    if wanted is None:
        found = cls.targets(model)
    elif wanted == "all-linear":
        found = Adapter.targets(model)
    else:
        found = [name for name in names if _matches(name, wanted) and not name.endswith(".base_layer")]
    excluded = entry.get("exclude_modules")
    if excluded:
        found = [name for name in found if not _matches(name, excluded)]
    if entry.get("ranks"):
        found = _ranked(cls, entry, names, found if wanted is not None or excluded else None)
    if not found:
        some = ", ".join([n for n, m in names.items() if layers.kind_of(m) == "linear"][:6])
        raise ModelError(
            f"{entry['name']}: target_modules={wanted!r} matches no layer of {type(model).__name__}. "
            f"Its linear layers are called {some} ..."
        )
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda name: order[name])


def _ranked(cls: type, entry: Mapping[str, Any], names: Mapping[str, nn.Module], among: list[str] | None) -> list[str]:
    """The layers to which a rank table gives a rank.

    Raises:
        RecipeError: the part has no rank, or the table names a layer that the model has not, or leaves one out.
    """
    table: Mapping[str, int] = entry["ranks"]
    if "rank" not in catalog.get(entry["name"]).options:
        raise RecipeError(f"{entry['name']} has no `rank`, which a rank table could set; leave `ranks` out")
    if unknown := [name for name in table if name not in names]:
        raise RecipeError(
            f"ranks: the model has no layer {unknown[0]!r} ({len(unknown)} of {len(table)} names are unknown); a table "
            "belongs to one architecture"
        )
    if among is not None and (missing := [name for name in among if name not in table]):
        raise RecipeError(f"ranks: the table says nothing of {missing[0]!r}, which target_modules names")
    return [name for name in (table if among is None else among) if table[name] > 0]


def spec_of(module: nn.Module, name: str) -> layers.LayerSpec:
    return module.spec if isinstance(module, TunesmithLayer) else layers.describe(module, name)


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)
