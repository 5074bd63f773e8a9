"""Layers of a cache that know which columns they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.zoo import tiny
from tunesmith.core.attention import PositionedLayer, positioned
from tunesmith.errors import ModelError


def entries(start: int, count: int, rows: int = 2) -> Tensor:
    """Keys whose numbers are their columns, (rows, 1, count, 1); row r adds 100 r."""
    columns = torch.arange(start, start + count).float().view(1, 1, count, 1)
    return columns + 100 * torch.arange(rows).view(rows, 1, 1, 1)


OPERATIONS = st.lists(st.tuples(st.sampled_from(["update", "skip", "crop"]), st.integers(1, 4)), max_size=12)


@given(OPERATIONS)
def test_columns_follow_updates_skips_and_crops(operations: list[tuple[str, int]]) -> None:
    layer, held, seen = PositionedLayer(), list[int](), 0
    for name, count in operations:
        if name == "update":
            keys, values = layer.update(entries(seen, count), -entries(seen, count))
            held += range(seen, seen + count)
            seen += count
            assert torch.equal(keys, -values)
        elif name == "skip":
            layer.skip(count)
            seen += count
        else:
            layer.crop(-min(count, seen))
            seen -= min(count, seen)
            held = [c for c in held if c < seen]
        assert layer.columns.tolist() == held
        assert layer.get_seq_length() == seen
        assert layer.get_mask_sizes(3) == (seen + 3, 0)
        if layer.is_initialized:
            assert layer.keys[0, 0, :, 0].tolist() == held
            assert layer.keys.shape == layer.values.shape


def test_keep_drops_the_rest() -> None:
    layer = PositionedLayer()
    layer.update(entries(0, 3), entries(0, 3))
    layer.skip(2)
    layer.update(entries(5, 2), entries(5, 2))
    layer.keep(torch.tensor([0, 2, 4]))
    assert layer.columns.tolist() == [0, 2, 6]
    assert layer.keys[1, 0, :, 0].tolist() == [100, 102, 106]
    assert layer.values[0, 0, :, 0].tolist() == [0, 2, 6]
    assert layer.get_seq_length() == 7
    layer.crop(-1)
    assert layer.columns.tolist() == [0, 2]


def test_rows_are_reordered_also_where_nothing_is_held() -> None:
    cache = DynamicCache()
    for index in range(2):
        positioned(cache, index)
    cache.update(entries(0, 2), entries(0, 2), 0)
    cache.layers[1].skip(2)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [100, 100]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    assert cache.layers[0].keys.shape[0] == 3
    assert cache.get_seq_length() == cache.get_seq_length(1) == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].columns.tolist() == []


def test_only_an_empty_dynamic_cache_can_know_positions() -> None:
    config = tiny("llama").config
    for cache in (DynamicCache(), DynamicCache(config=config)):
        made = positioned(cache, 1)
        assert isinstance(made, PositionedLayer)
        assert positioned(cache, 1) is made
    cache = DynamicCache()
    cache.update(entries(0, 1), entries(0, 1), 0)
    with pytest.raises(ModelError, match="layer 0 of the cache is filled"):
        positioned(cache, 0)
    with pytest.raises(ModelError, match="of another kind"):
        positioned(StaticCache(config, max_cache_len=8), 0)
