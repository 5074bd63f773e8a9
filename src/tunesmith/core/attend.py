"""Attention that adapters can look into and add to.

An attention function, registered with transformers, that asks the plugs of its layer: for keys and values to put before
the layer's own, and to look at the probabilities. A layer without plugs computes what it always did, on SDPA.

    enable(model)
    handle = plug(model.model.layers[0].self_attn, made)     # `made` is a Plug
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask

from tunesmith.errors import ModelError

NAME = "tunesmith_plugged"
_PLUGS = "tunesmith_plugs"


class Plug(Protocol):
    """What an adapter does inside an attention layer.

    Attributes:
        looks: Whether `look` wants the probabilities; costs the fused kernel.
    """

    looks: bool

    def before(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every query sees besides the layer's own, before them; None for none.

        Args:
            query: (B, heads, T, dim).
            key: (B, key heads, S, dim).

        Returns:
            (B or 1, key heads, P, dim) each. They do not enter the cache.
        """

    def look(self, probabilities: Tensor) -> None:
        """See (B, heads, T, S) over the layer's own keys, without dropout."""


def enable(model: nn.Module) -> str | None:
    """Let the layers of a transformers model be plugged; returns what its attention was called before.

    Raises:
        ModelError: the model's attention is not behind transformers' interface, or is laid out end to end.
    """
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before == NAME:
        return before
    if before is not None and before not in ("eager", "sdpa"):
        raise ModelError(
            f"{type(model).__name__} computes its attention by {before!r}, into which this method cannot look; load it "
            "with `attn_implementation='sdpa'`, and set `data.padding_free` to false"
        )
    try:
        cast(Any, model).set_attn_implementation(NAME)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{type(model).__name__} does not take another attention function: {error}") from None
    return before


def plug(attention: nn.Module, made: Plug) -> RemovableHandle:
    """Put a plug into an attention layer; take it out by the handle's `remove()`."""
    held: OrderedDict[int, Plug] = attention.__dict__.setdefault(_PLUGS, OrderedDict())
    handle = RemovableHandle(held)
    held[handle.id] = made
    return handle


def plugged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls; shapes as its own attention functions have them."""
    plugs: list[Plug] = list(module.__dict__.get(_PLUGS, {}).values())
    extra = [pair for made in plugs if (pair := made.before(query, key)) is not None]
    looking = [made for made in plugs if made.looks]
    if not extra and not looking:
        given = {"position_bias": position_bias} if position_bias is not None else {}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given, **kwargs
        )
    own = key.shape[2]
    mask = attention_mask[..., :own] if attention_mask is not None else None
    bias = position_bias if mask is None else mask if position_bias is None else position_bias + mask
    keys = [k.to(key.dtype).expand(key.shape[0], -1, -1, -1) for k, _ in extra]
    values = [v.to(value.dtype).expand(value.shape[0], -1, -1, -1) for _, v in extra]
    added = sum(k.shape[2] for k in keys)
    key, value = torch.cat([*keys, key], 2), torch.cat([*values, value], 2)
    if bias is not None and added:
        bias = F.pad(bias, (added, 0))
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not looking:
        bias = None if bias is None else bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = query @ key.transpose(2, 3) * scaling
    probabilities = torch.softmax(scores if bias is None else scores + bias, -1, dtype=torch.float32).to(query.dtype)
    for made in looking:
        made.look(probabilities[..., added:])
    out = F.dropout(probabilities, dropout) @ value
    return out.transpose(1, 2).contiguous(), probabilities[..., added:]


AttentionInterface.register(NAME, plugged_attention)
AttentionMaskInterface.register(NAME, eager_mask)
