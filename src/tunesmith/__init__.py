"""Tunesmith: published fine-tuning methods as parts of the PyTorch and Hugging Face stack.

    import tunesmith

    model = get_peft_model(model, tunesmith.adapter("dylora", rank=8))    # any part of `adapters` and `prompts`
    report = tunesmith.run("recipe.yaml")                                  # the whole job
    print(tunesmith.catalog.parts())                                       # what there is

Names are imported when first used: `import tunesmith` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "adapter": "tunesmith.core.bridge",
    "stack": "tunesmith.core.bridge",
    "register_peft": "tunesmith.core.bridge",
    "initialise": "tunesmith.core.initialise",
    "export_lora": "tunesmith.core.export",
    "Adapter": "tunesmith.core.adapter",
    "Prompt": "tunesmith.core.prompt",
    "Schedule": "tunesmith.core.schedule",
    "Objective": "tunesmith.core.objective",
    "TrainerMixin": "tunesmith.core.trainer",
    "callbacks": "tunesmith.core.steps",
    "set_lr_ratios": "tunesmith.core.optimizer",
    "Checkpoint": "tunesmith.core.statedict",
    "Judges": "tunesmith.core.merging",
    "merge": "tunesmith.core.merging",
    "merged": "tunesmith.core.merging",
    "Services": "tunesmith.core.selection",
    "Subjects": "tunesmith.core.analysis",
    "deploy": "tunesmith.core.adapter",
    "step": "tunesmith.core.steps",
    "side": "tunesmith.core.side",
    "RankTable": "tunesmith.core.ranks",
    "part": "tunesmith.core.part",
    "load_model": "tunesmith.models",
    "run": "tunesmith.train",
    "pipeline": "tunesmith.train",
    "Recipe": "tunesmith.recipe",
    "TunesmithError": "tunesmith.errors",
}

_MODULES = {"catalog", "world", "models", "evidence", "report"}

__all__ = ["__version__", *sorted(_LAZY), *sorted(_MODULES)]

if TYPE_CHECKING:
    from tunesmith import catalog as catalog
    from tunesmith.errors import TunesmithError as TunesmithError


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tunesmith.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
