"""Recognising, where they are called, the operations whose inputs `core/compact.py` keeps compressed.

F.linear and Conv1D's addmm, attention's matmuls, softmax, scaled_dot_product_attention, GELU, SiLU and ReLU, the
product of a gated MLP, F.layer_norm and F.rms_norm. Whether a weight trains is looked up in each call. Anything else is
as it was: other operations, passes without gradients, and `nn.MultiheadAttention`, which transformers' models do not
use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tunesmith.core import compact
from tunesmith.core.compact import Fixed

GELU, OPERAND, PROBABILITY = Fixed(4, 2), Fixed(8, 3), Fixed(8, 0, signed=False)
"""SlimFit's formats."""


@dataclass(frozen=True)
class Settings:
    """What is kept, and how.

    Attributes:
        activation: Format of the inputs of GELU, SiLU and their kin.
        operand: Format of inputs of linear layers that train, and of factors of products of activations.
        probability: Format of softmax outputs.
        kept: Share of the normalised numbers that a resting norm keeps.
        linear: Whether all linear layers keep their inputs in fixed point, or only those with more inputs than
            outputs, such as the second of an MLP; the others then keep them as they are.
    """

    activation: Fixed = GELU
    operand: Fixed = OPERAND
    probability: Fixed = PROBABILITY
    kept: float = 0.1
    linear: Literal["all", "wide"] = "all"


class _Here(threading.local):
    """What is known of the tensors of the scope that a thread is in."""

    def __init__(self) -> None:
        self.on = False
        self.clear()

    def clear(self) -> None:
        self.inputs: Any = WeakTensorKeyDictionary()
        """Inputs of linear layers: version and codes."""
        self.probabilities: Any = WeakTensorKeyDictionary()
        """Softmax outputs: their codes, or None and the factor that dropout put on them."""
        self.activated: Any = WeakTensorKeyDictionary()
        """Outputs of activation functions."""


class Compact(TorchFunctionMode):
    """On inside `scope()`; each thread has one of its own."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.here = settings, _Here()
        self.enabled = True
        """Copies of a model that was compressed ask too."""
        # Probabilities are made again from q and k: clamped outliers there would change all of them.
        self._fused = replace(settings.operand, rows=True)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """On inside the block; scopes do not nest, but for a model that calls a part of itself in another way."""
        if self.here.on or not self.enabled:
            yield
            return
        self.here.on = True
        try:
            with self:
                yield
        finally:
            self.here.on = False
            self.here.clear()

    @property
    def wanted(self) -> bool:
        """Whether what runs now is to be differentiated in the usual way."""
        return self.here.on and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and self.wanted and "out" not in kwargs:
            made = handler(self, lambda: func(*args, **kwargs), *args, **kwargs)
            if made is not None:
                return made
        return func(*args, **kwargs)

    # Each handler gives the result, or None where the plain operation keeps no more ---------------------------------

    # Parameters are called as torch calls them, so that keywords arrive.

    def linear(self, plain: compact.Plain, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor | None:
        return self._linear(plain, input, weight, bias, False)

    def addmm(self, plain: compact.Plain, input: Any, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
        # `Conv1D`; anything with factors, or with more than a row to add, is something else.
        return None if scales or input.dim() != 1 else self._linear(plain, mat1, mat2, input, True)

    def _linear(self, plain: compact.Plain, x: Tensor, weight: Tensor, bias: Any, transposed: bool) -> Tensor | None:
        if not (x.requires_grad or weight.requires_grad) or not x.is_floating_point() or weight.dim() != 2:
            return None
        codes = None
        if weight.requires_grad:
            if self.settings.linear == "wide" and x.shape[-1] <= weight.numel() // x.shape[-1]:
                return None
            codes = self._input(x)
        return compact.Linear.apply(plain, x, weight, bias, codes, self.settings.operand, transposed)

    def _input(self, x: Tensor) -> Tensor:
        """Codes of a linear layer's input, the same for all layers that read it."""
        version, codes = self.here.inputs.get(x, (None, None))
        if version != x._version:
            codes = self.settings.operand.encode(x)
            self.here.inputs[x] = (x._version, codes)
        return codes

    def matmul(self, plain: compact.Plain, input: Tensor, other: Tensor) -> Tensor | None:
        # Attention's factors have four dimensions: rows, heads, tokens, channels. Weights have two or three.
        if min(input.dim(), other.dim()) < 4 or not (input.requires_grad or other.requires_grad):
            return None
        codes, scale = self.here.probabilities.get(input, (None, None))
        operand = self.settings.operand
        first = operand if scale is None else self.settings.probability
        return compact.Product.apply(plain, input, other, (codes, None), (first, operand), scale or 1.0, True)

    def multiply(self, plain: compact.Plain, input: Any, other: Any) -> Tensor | None:
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or input.shape != other.shape:
            return None
        gate = input in self.here.activated or other in self.here.activated
        if not gate or not (input.requires_grad or other.requires_grad):
            return None
        operand = self.settings.operand
        return compact.Product.apply(plain, input, other, (None, None), (operand, operand), 1.0, False)

    def softmax(self, plain: compact.Plain, input: Tensor, dim: Any = None, *_: Any, **__: Any) -> Tensor | None:
        if input.dim() < 4 or dim not in (-1, input.dim() - 1) or not input.requires_grad:
            return None  # a router's, say
        out, codes = compact.Softmax.apply(plain, input, dim, self.settings.probability)
        self.here.probabilities[out] = (codes, 1.0)
        return out

    def cast(self, plain: compact.Plain, input: Tensor, *_: Any, **__: Any) -> Tensor | None:
        """Probabilities of another type are probabilities."""
        held = self.here.probabilities.get(input)
        return None if held is None else self._probabilities(plain(), *held)

    def dropout(
        self, plain: compact.Plain, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor | None:
        held = self.here.probabilities.get(input)
        if held is None or inplace or not training or not 0 < p < 1:
            return None
        return self._probabilities(plain(), None, held[1] / (1 - p))

    def _probabilities(self, out: Tensor, codes: Tensor | None, scale: float) -> Tensor:
        self.here.probabilities[out] = (codes, scale)
        return out

    def activate(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """A smooth function of each number by itself."""
        if not x.requires_grad:
            return None
        return self._activated(compact.Activation.apply(apply, x, self.settings.activation))

    def gelu(self, plain: compact.Plain, input: Tensor, **named: Any) -> Tensor | None:
        return self.activate(lambda given: F.gelu(given, **named), input)

    def silu(self, plain: compact.Plain, input: Tensor, inplace: bool = False) -> Tensor | None:
        return None if inplace else self.activate(F.silu, input)

    def relu(self, plain: compact.Plain, input: Tensor, inplace: bool = False) -> Tensor | None:
        if inplace or not input.requires_grad:
            return None
        return self._activated(compact.ReLU.apply(plain, input))

    def _activated(self, out: Tensor) -> Tensor:
        self.here.activated[out] = True
        return out

    def layer_norm(
        self,
        plain: compact.Plain,
        input: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        return self.norm(plain, input, weight, bias, True, 0.0, eps, len(normalized_shape))

    def rms_norm(
        self, plain: compact.Plain, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
    ) -> Tensor | None:
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return self.norm(plain, input, weight, None, False, 0.0, eps, len(normalized_shape))

    def norm(
        self,
        plain: compact.Plain,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: bool,
        offset: float,
        eps: float,
        dims: int,
    ) -> Tensor | None:
        """A norm that trains keeps its input, as it does by itself."""
        if not x.requires_grad or (weight is not None and weight.requires_grad):
            return None
        return compact.Norm.apply(plain, x, weight, bias, centred, offset, eps, dims, self.settings.kept)

    def attend(
        self,
        plain: compact.Plain,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *flags: Any,
        **named: Any,
    ) -> Tensor | None:
        if not (query.requires_grad or key.requires_grad or value.requires_grad):
            return None

        def again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, *flags, **named)

        return compact.Attention.apply(again, query, key, value, attn_mask, self._fused, dropout_p > 0)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: Compact.linear,
    torch.addmm: Compact.addmm,
    torch.matmul: Compact.matmul,
    Tensor.matmul: Compact.matmul,
    torch.mul: Compact.multiply,
    Tensor.mul: Compact.multiply,
    F.softmax: Compact.softmax,
    torch.softmax: Compact.softmax,
    Tensor.softmax: Compact.softmax,
    F.dropout: Compact.dropout,
    Tensor.to: Compact.cast,
    Tensor.type_as: Compact.cast,
    F.gelu: Compact.gelu,
    F.silu: Compact.silu,
    F.relu: Compact.relu,
    torch.relu: Compact.relu,
    Tensor.relu: Compact.relu,
    F.layer_norm: Compact.layer_norm,
    F.rms_norm: Compact.rms_norm,
    F.scaled_dot_product_attention: Compact.attend,
}
