"""What a batch says beside its inputs, such as the group that each row belongs to, brought to the adapters that ask.

A forward pass takes it as a keyword, `model(**batch, group=ids)`; around `generate`, which does not, write

    with tunesmith.side(model, group=ids):
        model.generate(...)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter
from tunesmith.errors import DataError

GROUP = "group"
"""The group (task, family, language) of each row, (B,) int64: an index into the adapter's `groups`."""
UNKNOWN = -1
"""The index of a group that the adapter was not trained for."""


class Context:
    """Side information of one model: what the running forward pass was given, else what a block around it gave."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.around: dict[str, Tensor] = {}
        self._handle: Any = None

    def attach(self, model: nn.Module) -> None:
        """Look at every call of the model, if one of its adapters asks for something."""
        if self._handle is None and asked(model):
            self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def detach(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.enter(model, kwargs)
        return args, kwargs

    def enter(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Take what the adapters of `model` ask for out of a forward pass's keywords.

        What was given stays until the next forward pass: activation checkpointing runs layers again after this one.
        """
        names = asked(model)
        self.values = {**self.around, **{name: kwargs.pop(name) for name in names if name in kwargs}}

    def get(self, name: str, rows: int) -> Tensor | None:
        """One entry per row of the batch, (rows,); None if nothing was said. Beams of one row share its entry.

        Raises:
            DataError: there is another number of entries.
        """
        value = self.values.get(name)
        if value is None or len(value) == rows:
            return value
        if rows % len(value):
            raise DataError(f"{name} has {len(value)} entries; the batch has {rows} rows")
        return value.repeat_interleave(rows // len(value))


def asked(model: nn.Module) -> set[str]:
    """Names of the side information that the adapters of a model want."""
    return {name for m in model.modules() if isinstance(m, Adapter) for name in m.side}


@contextmanager
def side(model: nn.Module, **values: Tensor) -> Iterator[None]:
    """Give side information to every forward pass inside the block, `generate` among them."""
    contexts = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "side_context", None), Context)}
    held = [(context, context.around, context.values) for context in contexts.values()]
    for context in contexts.values():
        context.around = {**context.around, **values}
        context.values = dict(context.around)
    try:
        yield
    finally:
        for context, around, before in held:
            context.around, context.values = around, before


@dataclass(frozen=True)
class Grouped:
    """A collator that also gives the group of each row, as an index into `groups`; `UNKNOWN` for any other.

    Attributes:
        collator: Makes the rest of the batch.
        groups: Names, in the adapter's order.
        column: Of the rows.
    """

    collator: Any
    groups: tuple[str, ...]
    column: str = GROUP

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch and `group`, (B,) int64."""
        return {**self.collator(rows), GROUP: indices(self.groups, [row.get(self.column) for row in rows])}


def indices(groups: Sequence[str], names: Iterable[str | None]) -> Tensor:
    """Indices of group names, (n,) int64."""
    at = {name: i for i, name in enumerate(groups)}
    return torch.tensor([at.get(str(name), UNKNOWN) for name in names])


def groups_of(model: nn.Module) -> tuple[str, ...] | None:
    """The groups that the adapters of a model tell apart; None if they ask for none.

    Raises:
        DataError: two adapters know different ones.
    """
    found = {tuple(m.groups) for m in model.modules() if isinstance(m, Adapter) and GROUP in m.side}  # type: ignore
    if len(found) > 1:
        raise DataError(f"the adapters of the model know different groups: {' and '.join(map(str, sorted(found)))}")
    return next(iter(found), None)
