"""The merging contract: a function of tensors, applied one at a time over checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.core.statedict import Checkpoint, check_alike, write
from tunesmith.errors import CheckpointError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judges:
    """What a method may ask about a candidate; each is None where the caller gave none.

    Attributes:
        score: `(tensors) -> float`, higher is better, on validation data.
        loss: `(tensors) -> scalar`, differentiable in the tensors, on validation data.
    """

    score: Callable[[State], float] | None = None
    loss: Callable[[State], Tensor] | None = None


class Merge(ABC):
    """A way to make one checkpoint of several. Options are keyword-only parameters of `__init__`.

    Attributes:
        needs_base: Whether it works on differences from a base model.
        needs_score, needs_loss: Whether it asks `Judges`.
    """

    needs_base: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False

    def prepare(self, base: Checkpoint | None, models: Sequence[Checkpoint], judges: Judges) -> None:
        """Look at everything once before the first tensor: names, depths, norms, which models to keep."""

    @abstractmethod
    def tensor(self, name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
        """The merged tensor.

        Args:
            name: Of the tensor.
            base: Of the base, float32 or wider; None without one.
            models: Of each model, in the given order, float32 or wider.
        """

    def record(self) -> dict[str, object]:
        """What was decided, for the model card: coefficients, models kept."""
        return {}


def merged(
    method: Merge, models: Sequence[Checkpoint], base: Checkpoint | None = None, judges: Judges | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged tensor, one at a time, in the dtype of the first model's (or the base's) tensor.

    Integer and boolean tensors are not merged: they must be equal everywhere.

    Raises:
        CheckpointError: nothing to merge, a base or judge that the method needs is missing, names or shapes differ,
            integer tensors differ, a value that is not finite.
    """
    judges = judges or Judges()
    label = type(method).__name__
    if not models:
        raise CheckpointError(f"{label}: no models were given")
    if method.needs_base and base is None:
        raise CheckpointError(f"{label} works on differences from a base model; give one")
    if method.needs_score and judges.score is None:
        raise CheckpointError(f"{label} chooses by validation score; give validation data")
    if method.needs_loss and judges.loss is None:
        raise CheckpointError(f"{label} learns from a validation loss; give validation data")
    reference = base if base is not None else models[0]
    check_alike(reference, models)
    method.prepare(base, models, judges)
    for name in reference:
        yield name, _one(method, name, reference, base, models)


def _one(
    method: Merge, name: str, reference: Checkpoint, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> Tensor:
    kept = reference[name]
    if not kept.is_floating_point():
        for model in models:
            if not torch.equal(model[name], kept):
                raise CheckpointError(f"{name!r} is {kept.dtype} and differs in {model.name}; it cannot be merged")
        return kept
    wide = torch.promote_types(kept.dtype, torch.float32)
    values = [model[name].to(wide) for model in models]
    for model, value in zip(models, values, strict=True):
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{name!r} in {model.name} has values that are not finite")
    result = method.tensor(name, None if base is None else base[name].to(wide), values).to(kept.dtype)
    if result.shape != kept.shape:
        raise CheckpointError(
            f"{type(method).__name__} made {tuple(result.shape)} of {name!r}, {tuple(kept.shape)} is due"
        )
    return result


def merge(
    method: Merge,
    models: Sequence[Checkpoint],
    output: str | Path,
    base: Checkpoint | None = None,
    judges: Judges | None = None,
) -> Path:
    """Merge into a model folder, with the config and tokenizer of the base (or of the first model)."""
    like = (base if base is not None else models[0]).folder
    return write(output, merged(method, models, base, judges), like=like)
