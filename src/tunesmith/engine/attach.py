"""Putting a run's adapters, prompts and inference parts onto a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tunesmith.core import meters
from tunesmith.core.bridge import adapter, stack
from tunesmith.core.part import Use
from tunesmith.errors import ModelError
from tunesmith.models import embedded
from tunesmith.models.loader import Task
from tunesmith.recipe import Recipe

_PEFT_TASK = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "text-classification": "SEQ_CLS"}
_HEADS = ("classifier", "score")


def attach(model: nn.Module, recipe: Recipe, uses: Mapping[str, Sequence[Use]], task: Task) -> nn.Module:
    """The model with everything on it that the recipe names; the base is frozen if there is an adapter or prompt.

    Raises:
        ModelError: a part matches no layer of the model, or cannot change one that it was given, or nothing trains.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from peft.utils.error import NoMatchingPeftModuleError

    if not recipe.full:
        if recipe.model.quantization != "none":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        whole_model = any("whole-model" in use.part.tags for use in uses.get("adapters", []))
        heads = [name for name in _HEADS if task == "image-classification" and hasattr(model, name) and not whole_model]
        # PEFT trains the head of a classifier whole, if it is told the task.
        told = None if whole_model and task == "text-classification" else _PEFT_TASK.get(task)
        common: dict[str, Any] = {"task_type": told, "modules_to_save": heads or None}
        configs = [
            adapter(
                spec.name,
                target_modules=spec.target_modules,
                exclude_modules=spec.exclude_modules,
                ranks=spec.ranks,
                **common,
                **dict(use.options),
            )
            for spec, use in zip(recipe.adapters, uses.get("adapters", []), strict=True)
        ]
        configs += [adapter(use.part.slug, **common, **dict(use.options)) for use in uses.get("prompts", [])]
        try:
            model = get_peft_model(model, stack(*configs))
        except NoMatchingPeftModuleError as error:
            raise ModelError(f"{_names(recipe)}: {error} {_layers(model)}") from None
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_name(recipe.model.name)
    trained, whole = meters.trainable(model)
    if trained == 0:
        raise ModelError(
            f"nothing trains: all {whole:,} numbers of {type(model).__name__} are frozen. Name an adapter."
        )
    return model


def _names(recipe: Recipe) -> str:
    return " + ".join(spec.name for spec in recipe.adapters)


def _layers(model: nn.Module) -> str:
    """The last parts of the names of the layers that hold a matrix, as a hint."""
    named = (name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight"))
    return f"The layers of {type(model).__name__}: {', '.join(dict.fromkeys(named))}."


def base_name(name: str) -> str:
    """How a saved adapter names its base: an embedded model or a hub id by name, a folder by its absolute path."""
    return name if name in embedded.EMBEDDED or not Path(name).exists() else str(Path(name).resolve())
