"""The analysis contract: `(subjects) -> Report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.core.modelmap import depths, roles_from_names
from tunesmith.core.statedict import Checkpoint, check_alike
from tunesmith.errors import TunesmithError

_NO_MATRIX = ("embedding", "position", "head", "norm")


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

    def pair(self, analysis: str) -> tuple[Checkpoint, Checkpoint]:
        """(base, tuned), with the same names and shapes.

        Raises:
            TunesmithError: there is no base.
            CheckpointError: they are not the same architecture.
        """
        if self.base is None:
            raise TunesmithError(f"{analysis} compares a model with the one it was tuned from; give the base as well")
        check_alike(self.base, [self.tuned])
        return self.base, self.tuned


def matrices(checkpoint: Checkpoint) -> list[str]:
    """Names of the weight matrices of linear layers: two dimensions; no embedding, position table, head or norm."""
    roles = roles_from_names(checkpoint)
    floating = (n for n in checkpoint if checkpoint.describe(n)[1].is_floating_point)
    return [n for n in floating if len(checkpoint.describe(n)[0]) == 2 and roles[n].kind not in _NO_MATRIX]


def transposed(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the matrices that are stored as (in, out), as GPT-2's `Conv1D` does; all others are (out, in).

    Read off the biases, which have the length of the output: nothing has to be known of the architecture. A square
    matrix with a bias does not tell; it counts as the other matrices of its stack of blocks (of the whole checkpoint
    outside of the blocks), and as (out, in) where none of those tells either.
    """
    stacks = {name: depth.stack if depth else "" for name, depth in depths(checkpoint).items()}
    told: dict[str, bool] = {}
    open_: list[str] = []
    for name in matrices(checkpoint):
        bias = f"{name.removesuffix('weight')}bias"
        if not name.endswith("weight") or bias not in checkpoint:
            continue
        (rows, columns), (length, *_) = checkpoint.describe(name)[0], checkpoint.describe(bias)[0]
        if rows == columns:
            open_.append(name)
        elif length in (rows, columns):
            told[name] = length == columns
    for name in open_:
        alike = [flipped for other, flipped in told.items() if stacks[other] == stacks[name]] or list(told.values())
        told[name] = bool(alike) and sum(alike) * 2 > len(alike)
    return frozenset(name for name, flipped in told.items() if flipped)
