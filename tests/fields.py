"""Fields of recipes that ask for the parts of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith import catalog
from tunesmith.core.part import Part
from tunesmith.recipe import METHODS, Recipe

TRAINING = [part for part in catalog.parts().values() if part.room in METHODS]


def field_of(part: Part, **options: Any) -> dict[str, Any]:
    """The field of a recipe that asks for a part."""
    spec = {"name": part.slug, **options}
    if part.room == "data":
        return {"data": {"select": [spec]}}
    field = "regularisers" if "regulariser" in part.tags else METHODS[part.room]
    return {field: [spec] if isinstance(getattr(Recipe(), field), list) else spec}


def joined(*fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of several parts in one recipe; lists are put together."""
    found: dict[str, Any] = {}
    for one in fields:
        for key, value in one.items():
            held = found.get(key)
            if isinstance(held, dict) and isinstance(value, dict) and key in ("data", "train", "model"):
                found[key] = joined(held, value)
            else:
                found[key] = [*held, *value] if isinstance(held, list) else value
    return found
