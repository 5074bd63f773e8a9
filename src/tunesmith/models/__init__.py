"""Loading any model by path or id, and the small models that come with the package."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {"load_model": "tunesmith.models.loader", "Loaded": "tunesmith.models.loader"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tunesmith.models' has no attribute {name!r}")
