"""The compression contract: a model in place, block after block, from calibration data.

for block in walk(model, batches):
    found = block.statistics(("input_mean", "input_square"))      # inputs from blocks that are already compressed
    ...                                                           # change the layers `block.linears`
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tunesmith.core.modelmap import block_linears, depths
from tunesmith.core.report import Report
from tunesmith.core.stats import collect
from tunesmith.errors import ModelError, RecipeError, TunesmithError


class Compressor(ABC):
    """A way to make a model's weights smaller. Options are keyword-only parameters of `__init__`."""

    @abstractmethod
    def __call__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Report:
        """Change the model in place.

        Args:
            model: Kept in its dtype; names and shapes of its tensors do not change unless the method says so.
            batches: Calibration batches, as keyword arguments of the model; padding is left out by its mask.

        Returns:
            What was done to each layer, and its cost.
        """


@dataclass(frozen=True)
class Block:
    """A block in its turn.

    Attributes:
        name: Dotted path, such as `model.layers.3`; empty for a model without blocks, which is one block itself.
        linears: Dotted paths of its linear layers (also `Conv1D` and quantised ones), in the model's order.
    """

    name: str
    linears: tuple[str, ...]
    _collect: Callable[[Sequence[str]], dict[str, dict[str, Tensor]]]

    def statistics(self, want: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """`core.stats.collect` over the calibration batches, as the block sees them now."""
        return self._collect(want)


def walk(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """The blocks of all stacks in order of execution, each seeing what the blocks before it make of the batches NOW.

    Every block runs twice per batch, whatever their number, inside the model's own forward pass: blocks that are done
    give their last stack's stored output instead of running, and the pass ends before the next block. So every block
    gets the masks and positions that its model gives it. One output per stack and batch is stored on its device.

    Args:
        model: In place; a key-value cache is switched off meanwhile. Blocks without linear layers are passed over.
        batches: Keyword arguments of the model.

    Raises:
        TunesmithError: no batches.
    """
    if not batches:
        raise TunesmithError("calibration needs at least one batch of data; none was given")
    place = {d.stack: d.count for d in depths(n for n, _ in model.named_parameters()).values() if d}
    names = [f"{stack}.{i}" for stack, count in place.items() for i in range(count)] or [""]
    linears = block_linears(model)
    runner = _Runner(model, names, len(batches))
    with _without_cache(model):
        for i, name in enumerate(names):
            inside = tuple(layer for layer in linears if not name or f"{layer}.".startswith(f"{name}."))
            if not inside:
                continue

            def statistics(want: Sequence[str], i: int = i, inside: tuple[str, ...] = inside) -> Any:
                with runner.at(i):
                    found = collect(runner, [f"model.{layer}" for layer in inside], batches, want=want)
                return {layer: found[f"model.{layer}"] for layer in inside}

            yield Block(name, inside, statistics)


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass before the first block that is not needed."""


class _Runner(nn.Module):
    """The model up to the block in turn, over stored outputs of the blocks that are done."""

    def __init__(self, model: nn.Module, names: Sequence[str], batches: int) -> None:
        super().__init__()
        self.model, self.names, self.count = model, names, batches
        self.done = 0  # blocks whose outputs need not be computed again: those before names[done]
        self.turn = 0
        self.batch = 0
        self.stored: dict[str, list[Any]] = {}

    def forward(self, **batch: Any) -> None:
        with suppress(_Stop):
            self.model(**batch)
        self.batch = (self.batch + 1) % self.count

    @contextmanager
    def at(self, turn: int) -> Iterator[None]:
        """Block `turn` is the last to run; the blocks since the last turn run once more, changed, and are stored."""
        patched: list[tuple[nn.Module, Any]] = []
        handles = []
        self.batch = 0

        def patch(i: int, forward: Callable[..., Any]) -> None:
            module = self.model.get_submodule(self.names[i])
            patched.append((module, module.__dict__.get("forward")))
            module.forward = forward

        try:
            for i in range(self.done):
                patch(i, self._stored(self.names[i].rpartition(".")[0]))
            for i in range(self.done, turn):
                stack = self.names[i].rpartition(".")[0]
                self.stored.setdefault(stack, [None] * self.count)
                block = self.model.get_submodule(self.names[i])
                handles.append(block.register_forward_hook(self._store(stack)))
            if turn + 1 < len(self.names):
                patch(turn + 1, self._stop)
            yield
            self.done = turn
        finally:
            for handle in handles:
                handle.remove()
            for module, before in patched:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = before

    def _stored(self, stack: str) -> Callable[..., Any]:
        # A copy, since a model may add to a block's output in place.
        return lambda *args, **kwargs: tree_map_only(Tensor, Tensor.clone, self.stored[stack][self.batch])

    def _store(self, stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stored[stack][self.batch] = tree_map_only(Tensor, Tensor.detach, output)

        return hook

    @staticmethod
    def _stop(*args: Any, **kwargs: Any) -> None:
        raise _Stop


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    was = getattr(config, "use_cache", None)
    if was is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if was is not None:
            config.use_cache = was


def smallest(metric: Tensor, sparsity: float, group: tuple[int, int] | None, layer: str) -> Tensor:
    """The mask of the smallest entries of each row, or of each group of a row; ties go to the first.

    Args:
        metric: (out, in).
        sparsity: Share of each row, rounded down to whole entries.
        group: (N, M) to keep the N largest of every M columns instead.
        layer: Its name, for the error message.

    Raises:
        ModelError: the columns do not divide into groups.
    """
    if group is None:
        count = int(metric.shape[1] * sparsity + 1e-9)  # 0.29 of 100 is 29, not 28
        order = metric.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)
    keep, M = group
    if metric.shape[1] % M:
        raise ModelError(
            f"the layer {layer!r} has {metric.shape[1]} inputs, which do not divide into groups of {M}; choose "
            "another `pattern` or give a `sparsity`"
        )
    parts = metric.unflatten(1, (-1, M))
    order = parts.argsort(dim=-1, stable=True)[..., : M - keep]
    return torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of `"N:M"`.

    Raises:
        RecipeError: not of that form, or 0 < N < M does not hold.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise RecipeError(f"`pattern` keeps N of every M weights, 0 < N < M, such as '2:4'; found {pattern!r}")
    return int(found[1]), int(found[2])
