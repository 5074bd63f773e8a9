"""The analysis contract: `(subjects) -> Report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.core.statedict import Checkpoint


@dataclass(frozen=True)
class Subjects:
    """What is looked at. An analysis takes what it needs and says in its error what is missing.

    Attributes:
        tuned: Weights of the model in question, adapters merged.
        base: Weights that it was tuned from.
        load: `("tuned" | "base") -> (model, tokenizer)`, for analyses that run the models.
        rows: Data to run them on.
    """

    tuned: Checkpoint
    base: Checkpoint | None = None
    load: Callable[[str], tuple[nn.Module, Any]] | None = None
    rows: Sequence[dict[str, Any]] = ()
