"""Which task a model and its rows are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from transformers.models.auto import modeling_auto as auto

from tunesmith.errors import DataError
from tunesmith.inputs.columns import FIELDS, SHAPES, plus

if TYPE_CHECKING:
    from tunesmith.recipe import Task

_ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "text-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
_HEADS = (
    ("ForSequenceClassification", "text-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
)


def infer_task(config: Any, columns: Iterable[str]) -> Task:
    """The task of a model with these columns (ours, after any mapping).

    Args:
        config: The model's `PreTrainedConfig`.
        columns: Our names that the rows have.

    Raises:
        DataError: the model and the rows contradict each other, or both leave it open.
    """
    columns = list(columns)
    task, model = _natural(config), _describe(config)
    fits = [t for t, shapes in SHAPES.items() if any(set(shape) <= set(columns) for shape in shapes)]
    if task == "causal-lm" and fits == ["causal-lm", "text-classification"] and "text" in columns:
        raise DataError(
            f"The rows have `text` and `label`, and the model is {model}. Write which is meant: "
            "`task: text-classification` (a classification head on this model) or `task: causal-lm` (the texts alone)."
        )
    if task is None:
        raise DataError(f"The model is {model}, which none of the tasks {', '.join(SHAPES)} is for. Write `task: ...`.")
    if fits and task not in fits:
        able = [t for t in fits if can(config, t)]
        way = f" To train it so, write `task: {able[0]}`." if able else " Use rows or a model of the other kind."
        raise DataError(
            f"The model is {model}, for {task}, which takes {', or '.join(map(plus, SHAPES[task]))}; the rows are for "
            f"{' or '.join(fits)} ({', '.join(c for c in FIELDS if c in columns)}).{way}"
        )
    return task


def check_task(config: Any, task: Task) -> None:
    """Raise `DataError` if no model of this architecture does `task`."""
    if not can(config, task):
        able = [t for t in SHAPES if can(config, t)]
        raise DataError(
            f"task: {task} is not possible with {_describe(config)}; that architecture does {', '.join(able) or 'none'}"
        )


def can(config: Any, task: str) -> bool:
    """Whether transformers has a model of this architecture for `task`."""
    text = getattr(config, "get_text_config", lambda: config)()
    types = {getattr(config, "model_type", ""), getattr(text, "model_type", "")}
    declared = any(name.endswith(end) for name in config.architectures or () for end, t in _HEADS if t == task)
    return declared or bool(types & set(_ARCHITECTURES[task]))


def _natural(config: Any) -> Task | None:
    for name in config.architectures or ():
        for end, task in _HEADS:
            if name.endswith(end) and not (task == "causal-lm" and getattr(config, "is_encoder_decoder", False)):
                return cast("Task", task)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq" if can(config, "seq2seq") else None
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "text-classification"
    order = ("causal-lm", "image-classification", "text-classification")
    return cast("Task | None", next((task for task in order if can(config, task)), None))


def _describe(config: Any) -> str:
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
