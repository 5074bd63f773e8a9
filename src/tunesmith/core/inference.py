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

from torch import Tensor, nn
from transformers import Cache, DynamicCache

from tunesmith.core.attention import PositionedLayer, positioned
from tunesmith.core.modelmap import blocks
from tunesmith.errors import ModelError

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
            names = _parameter_names(type(self.block).forward)
            cut = functools.partial(_first, columns=columns, past=self.past)
            args = tuple(cut(name, value) for name, value in zip(names, self._args, strict=False))
            out = self._forward(*args, **{name: cut(name, value) for name, value in self._kwargs.items()})
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
