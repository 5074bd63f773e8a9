"""The inference contract: a cheaper forward pass of a loaded model, attached and taken off again.

`BlockInference` is the port for methods that decide what each block of a decoder computes: on which columns, or not at
all. They see one `BlockCall` per block and forward pass, with the inputs under one name in every architecture.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from tunesmith.core.attention import PositionedLayer, positioned
from tunesmith.core.modelmap import blocks
from tunesmith.errors import CheckpointError, ModelError

_MARK = "_tunesmith_inference"


@dataclass
class Cost:
    """What was computed and what the plain model would have computed, both counted.

    Attributes:
        unit: What is counted, such as `"block-tokens"`.
        done: By the attached model.
        full: By the plain model on the same calls.
    """

    unit: str
    done: int = 0
    full: int = 0

    @property
    def share(self) -> float:
        """`done` over `full`; 1 before the first call."""
        return self.done / self.full if self.full else 1.0


class Inference(ABC):
    """Changes how a model is run, not its weights. Options are keyword-only parameters of `__init__`.

    Where a model must be tuned to bear the cheaper pass, the attached model trains with it too.

    Attributes:
        neutral: Options under which the attached model equals the plain one.
        frugal: Options under which it is cheaper on a model of four blocks with up to 64 positions.
        unit: What its cost counts.
    """

    neutral: ClassVar[Mapping[str, object]] = {}
    frugal: ClassVar[Mapping[str, object]] = {}
    unit: ClassVar[str] = "block-tokens"

    def __init__(self) -> None:
        self._cost = Cost(self.unit)

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Change the model's forward pass.

        Raises:
            ModelError: the model's architecture does not allow it; the reason is named. Or it has a method attached
                already.
        """

    @abstractmethod
    def detach(self) -> None:
        """Put the plain forward pass back, exactly. Without a model attached, nothing happens."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """Attached inside the block, taken off after it."""
        self.attach(model)
        try:
            yield model
        finally:
            self.detach()

    def cost(self) -> Cost:
        """A copy of what was counted since the start or the last `reset_cost`."""
        return replace(self._cost)

    def reset_cost(self) -> None:
        """Count from nothing again."""
        self._cost = Cost(self.unit)

    def training_state(self) -> dict[str, Tensor]:
        """What it learnt while the model trained, beyond parameters: kept in checkpoints, so that runs resume."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `training_state` gave.

        Raises:
            CheckpointError: it was another method's.
        """
        if state:
            raise CheckpointError(f"{type(self).__name__} keeps no state; found {', '.join(sorted(state))}")


def attached(model: nn.Module) -> Inference | None:
    """The method that is attached to a model, PEFT-wrapped or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Inference | None = getattr(base, _MARK, None)
    return found


@dataclass
class BlockCall:
    """One block in one forward pass.

    Attributes:
        index: Of the block; `count` is how many there are.
        block: The block.
        hidden: (B, q, dim), what enters it.
        positions: (B or 1, q) int64, the position that the model gives each token.
        layer: The block's layer of the cache; None without a cache.
        past: Columns that went by before this pass.
    """

    index: int
    count: int
    block: nn.Module
    hidden: Tensor
    positions: Tensor
    layer: PositionedLayer | None
    past: int
    _forward: Callable[..., Any] = field(repr=False)
    _args: tuple = field(repr=False)
    _kwargs: Mapping[str, Any] = field(repr=False)

    def run(self) -> Tensor:
        """The block on all of its inputs, (B, q, dim)."""
        return self._forward(*self._args, **self._kwargs)

    def run_apart(self) -> Tensor:
        """The same beside the cache: no keys are read from it or left in it."""
        return self._with(lambda name, value: None if name == "past_key_values" else value)

    def run_columns(self, columns: Tensor) -> Tensor:
        """Some of the q columns through the block, at their own positions; the others go by unchanged.

        A column attends to those of the chosen ones that come before it, and to the earlier columns whose keys the
        cache holds.

        Args:
            columns: (k,) int64, ascending, the same in all rows; their keys enter the cache, if there is one. Or
                (B, k), each row its own; the cache, which has one set of columns for all rows, then goes without.

        Returns:
            (B, q, dim); gradients reach the unchanged columns too.

        Raises:
            ModelError: an input cannot be cut (a mask of another kind, rows laid end to end, an input per token that
                is not known); or each row has its own columns and there were earlier ones.
        """
        q = self.hidden.shape[1]
        shared = columns.dim() == 1
        if self.past and not shared:
            raise ModelError(f"block {self.index}: after cached columns all rows must run the same ones")
        index = columns[None] if shared else columns
        held = torch.arange(self.past)
        if self.layer is not None and self.past:
            held = self.layer.columns
        keys = torch.cat([held.to(index.device).expand(len(index), -1), self.past + index], dim=1)

        def cut(name: str, value: Any) -> Any:
            return None if name == "past_key_values" and not shared else _taken(name, value, index, keys, q)

        out = self._with(cut).to(self.hidden.dtype)
        if self.layer is not None:
            if shared:
                self.layer.columns = keys[0].cpu()
            self.layer.seen = self.past + q
        return self.hidden.scatter(1, index[..., None].expand_as(out), out)

    def _with(self, change: Callable[[str, Any], Any]) -> Tensor:
        """The block on inputs that were changed, each by its name."""
        # Positional inputs stay so: reentrant checkpointing gives no gradient to others.
        names = _parameter_names(type(self.block).forward)
        args = tuple(change(name, value) for name, value in zip(names, self._args, strict=False))
        return self._forward(*args, **{name: change(name, value) for name, value in self._kwargs.items()})

    def run_first(self, columns: int) -> Tensor:
        """The block on the first of the q columns, (B, columns, dim); the others go by without keys.

        Raises:
            ModelError: the block attends from the first columns but lacks keys of earlier ones, or the model's mask
                is of a kind that cannot be cut.
        """
        q = self.hidden.shape[1]
        if self.layer is not None and columns and len(self.layer.columns) < self.past:
            raise ModelError(
                f"block {self.index} has keys of {len(self.layer.columns)} of the {self.past} earlier tokens: later "
                "tokens may not run more blocks than earlier ones"
            )
        if columns == q:
            return self.run()
        out = self.hidden[:, :0]
        if columns:
            out = self._with(functools.partial(_first, columns=columns, past=self.past))
        if self.layer is not None:
            self.layer.skip(q - columns)
        return out


def _first(name: str, value: Any, columns: int, past: int) -> Any:
    """An input of a block, for the first columns only."""
    if name == "attention_mask" and value is not None:
        if not isinstance(value, Tensor) or value.dim() != 4:
            raise ModelError(
                f"this model hands its blocks a mask that cannot be cut ({type(value).__name__}); load it with "
                'attn_implementation="sdpa" or "eager"'
            )
        return value[:, :, :columns, : past + columns]
    if name == "hidden_states":
        return value[:, :columns]
    if name == "position_ids":
        return value[:, :columns]
    if name == "position_embeddings" and value is not None:
        return tuple(part[:, :columns] for part in value)
    return value


def _taken(name: str, value: Any, columns: Tensor, keys: Tensor, q: int) -> Any:
    """An input of a block, for some columns only.

    Args:
        name: Of the input.
        value: Of all q columns.
        columns: (B or 1, k), counted from the first of the q.
        keys: (B or 1, m), which columns will have keys, counted from the first of the sequence.
        q: Columns that the block was given.
    """
    if name == "attention_mask" and value is not None:
        if isinstance(value, Tensor) and value.dim() == 4:
            return _gathered(_gathered(value, 2, columns), 3, keys)
        if isinstance(value, Tensor) and value.dim() == 2:
            return _gathered(value, 1, keys)
        raise ModelError(
            f"this model hands its blocks a mask that cannot be cut ({type(value).__name__}); load it with "
            'attn_implementation="sdpa" or "eager"'
        )
    if name in ("hidden_states", "position_ids"):
        return _gathered(value, 1, columns)
    if name == "position_embeddings" and value is not None:
        return tuple(_gathered(part, 1, columns) for part in value)
    if isinstance(value, Tensor) and (name.startswith("cu_seq_lens") or (value.dim() > 1 and value.shape[1] == q)):
        raise ModelError(f"the blocks of this model are given {name!r}, which is not known how to cut to some columns")
    return value


def _gathered(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """Entries `index`, (B or 1, k), of a dimension of (B or 1, ...)."""
    rows = [max(len(value), len(index)), *value.shape[1:]]
    if dim == 1:
        # Not `gather`, which keeps the whole of `value` for the backward pass.
        flat = index + torch.arange(rows[0], device=index.device)[:, None] * rows[1]
        taken = value.expand(rows).reshape(-1, *rows[2:]).index_select(0, flat.flatten())
        return taken.unflatten(0, flat.shape)
    around = [1] * value.dim()
    around[0], around[dim] = index.shape
    size = [*rows[:dim], index.shape[1], *rows[dim + 1 :]]
    return value.expand(rows).gather(dim, index.reshape(around).expand(size))


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


class BlockInference(Inference):
    """An inference method that decides, block by block, what is computed.

    Works on decoder-only language models; generation with a `DynamicCache`, training and activation checkpointing go
    through the same `run`. A deep copy of an attached model is attached to a copy of the method.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self._blocks: list[nn.Module] = []
        self._before: list[Any] = []
        self._past = 0

    @abstractmethod
    def run(self, call: BlockCall) -> Tensor:
        """What leaves the block, (B, q, dim)."""

    def check(self, count: int) -> None:
        """Refuse a model of `count` blocks that the options do not fit, with a ModelError. Fits unless overridden."""

    def attach(self, model: nn.Module) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.model is not None or hasattr(base, _MARK):
            raise ModelError("the model or the method is attached already; call detach() first")
        found = _decoder_blocks(base, type(self).__name__)
        self.check(len(found))
        self.model, self._blocks = base, found
        setattr(base, _MARK, self)
        for index, block in enumerate(found):
            # Partials of bound methods, not closures: copying the model copies them together with it.
            self._before.append(block.__dict__.get("forward"))
            block.forward = functools.partial(self._call, index, block.forward)

    def detach(self) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            # Another library, accelerate for one, may have replaced the forward of an instance before.
            if before is None:
                del block.forward
            else:
                block.forward = before
        if self.model is not None:
            delattr(self.model, _MARK)
        self.model, self._blocks, self._before = None, [], []

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        block = self._blocks[index]
        given = dict(zip(_parameter_names(type(block).forward), args, strict=False)) | kwargs
        hidden, positions = given["hidden_states"], given.get("position_ids")
        if positions is None or positions.dim() != 2:
            raise ModelError(
                f"{type(block).__name__} is not told its tokens' positions, (batch, length), which "
                f"{type(self).__name__} needs"
            )
        cache: Cache | None = given.get("past_key_values")
        layer = None if cache is None else positioned(cache, index)
        if index == 0:
            self._past = 0 if layer is None else layer.seen
        call = BlockCall(
            index=index,
            count=len(self._blocks),
            block=block,
            hidden=hidden,
            positions=positions,
            layer=layer,
            past=self._past,
            _forward=forward,
            _args=args,
            _kwargs=kwargs,
        )
        return self.run(call)


def _decoder_blocks(model: nn.Module, method: str) -> list[nn.Module]:
    name = type(model).__name__
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if config is None or can_generate is None or not can_generate():
        raise ModelError(f"{method} works on causal language models; {name} does not generate text")
    if config.is_encoder_decoder:
        raise ModelError(f"{method} works on decoder-only models; {name} is an encoder-decoder")
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if kinds:
        raise ModelError(
            f"{method} needs full attention in every block; the cache of {name} has {', '.join(sorted(kinds))}, which "
            "forgets tokens by itself"
        )
    stacks = blocks(model)
    if len(stacks) != 1:
        raise ModelError(f"{method} needs one stack of blocks; {name} has {', '.join(stacks)}")
    found = next(iter(stacks.values()))
    names = _parameter_names(type(found[0]).forward)
    if not {"hidden_states", "past_key_values"} <= set(names):
        raise ModelError(f"{method} cannot reach the inputs of {type(found[0]).__name__}; it takes {', '.join(names)}")
    return found
