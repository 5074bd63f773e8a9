"""A cache that knows positions: layers that hold only some of a sequence's columns, and know which.

A column is a position of the batch, padding included: 0 for the first of the prompt. Methods that skip, drop or evict
tokens leave the layers of a cache with different lengths. transformers reads the length of the sequence, the offset of
the next token and the size of the mask from layer 0; here every layer knows how many columns went by, so that these
stay right, and `crop`, which assisted decoding uses to take columns back, removes columns instead of entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from tunesmith.errors import ModelError


class PositionedLayer(DynamicLayer):
    """Keys and values of some columns, (B, heads, n, dim) each.

    Attributes:
        columns: (n,) int64, ascending: which columns they belong to.
        seen: Columns of the sequence so far, held or not.
    """

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = torch.empty(0, dtype=torch.long)
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the next columns and give all that are held: the port that attention layers call."""
        stop = self.seen + key_states.shape[-2]
        self.columns = torch.cat([self.columns, torch.arange(self.seen, stop)])
        self.seen = stop
        return super().update(key_states, value_states, *args, **kwargs)

    def skip(self, count: int) -> None:
        """Let the next `count` columns go by without keys."""
        self.seen += count

    def keep(self, index: Tensor) -> None:
        """Drop all entries but those at `index`, (m,) int64 ascending, counted among the entries held."""
        self.columns = self.columns[index.cpu()]
        self.keys = self.keys.index_select(-2, index.to(self.keys.device))
        self.values = self.values.index_select(-2, index.to(self.values.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` columns of the sequence back; transformers passes the number negative."""
        self.seen -= abs(tokens_to_remove)
        gone = int((self.columns >= self.seen).sum())
        self.columns = self.columns[: len(self.columns) - gone]
        super().crop(-gone)

    def reset(self) -> None:
        super().reset()
        self.columns, self.seen = torch.empty(0, dtype=torch.long), 0

    def get_seq_length(self) -> int:
        """Columns of the sequence, not entries: the position of the next token follows from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)


def positioned(cache: Cache, layer: int) -> PositionedLayer:
    """Layer `layer` of a cache, which is made to know positions while it is still empty.

    Raises:
        ModelError: the cache is of another kind (static, sliding, quantised, of an encoder-decoder), or was filled
            before.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ModelError(f"a {type(cache).__name__} cannot hold different columns per layer; pass a DynamicCache")
    while len(layers) <= layer and cache.layer_class_to_replicate is DynamicLayer:
        layers.append(DynamicLayer())
    found = layers[layer]
    if isinstance(found, PositionedLayer):
        return found
    if type(found) is not DynamicLayer or found.get_seq_length():
        state = "filled" if type(found) is DynamicLayer else "of another kind"
        raise ModelError(
            f"layer {layer} of the cache is {state} ({type(found).__name__}), and must be an empty DynamicLayer: "
            "start from an empty DynamicCache, which is what generate() makes unless told otherwise"
        )
    layers[layer] = PositionedLayer()
    return layers[layer]
