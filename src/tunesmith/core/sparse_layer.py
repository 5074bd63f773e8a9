"""Adapters that change chosen entries of a layer's weight: values that train, at places that may move.

    W' = W + scatter(values)

The dense change exists for the length of one layer's forward or backward pass and is never kept: autograd keeps the
layer's input, as it does for the frozen layer, and k values. The gradient of the values is gathered from the gradient
of W', which is dense and exists while its layer is passed through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tunesmith.core.entries import index_dtype
from tunesmith.core.layer import LayerSpec
from tunesmith.core.rebuilt import RebuiltAdapter
from tunesmith.errors import ModelError


class SparseAdapter(RebuiltAdapter):
    """k values at k places of the canonical weight, in float32.

    Attributes:
        indices: (k,) buffer, ascending places in the flattened canonical weight; int32 below 2^31 numbers.
        values: (k,) parameter, what is added there.
        watch: Called with the gradient of W', dense in the canonical shape, in each backward pass while it is set;
            for methods that look for better places. It must keep no reference to it.
    """

    indices: Tensor

    def __init__(self, layer: LayerSpec, count: int) -> None:
        super().__init__(layer)
        size = torch.Size(layer.shape).numel()
        if not 0 < count <= size:
            raise ModelError(
                f"{layer.name!r} has {size} entries, of which {type(self).__name__} is to train {count}; expected 1 to "
                f"{size}: change the density, or leave the layer out of `target_modules`"
            )
        self.register_buffer("indices", torch.arange(count, dtype=index_dtype(size), device=layer.device))
        self.values = nn.Parameter(torch.zeros(count, device=layer.device))
        self.watch: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def place(self, indices: Tensor, values: Tensor) -> Tensor:
        """Set places and values together.

        Args:
            indices: (k,), different, in any order; they are kept ascending.
            values: (k,), in the order of `indices`.

        Returns:
            The order that sorts them, (k,) int64, for whatever else belongs to the entries.
        """
        order = indices.argsort()
        self.indices.copy_(indices[order])
        self.values.copy_(values[order])
        return order

    def sparse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.indices, self.values.detach()

    def weight(self, W: Tensor) -> Tensor:
        flat = W.reshape(-1)
        return flat.index_add(0, self.indices, self.values.to(W.dtype)).view(W.shape)

    def seen(self, dW: Tensor) -> None:
        if self.watch is not None:
            self.watch(dW)

    def trainable_count(self) -> int:
        return self.values.numel()
