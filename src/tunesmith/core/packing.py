"""Rows laid end to end instead of padded, without seeing each other.

A batch of S rows becomes one row of N tokens with `cu_seq_lens_q` = (0, n_1, n_1 + n_2, ..., N), the keyword with which
transformers drives FlashAttention's variable-length kernels. `enable` gives every model the same on any device: an
attention function, registered with transformers, that attends within each row. No mask of N x N is built and no
multiplication is spent on padding.

Resetting `position_ids` alone does not separate rows: given an attention mask of ones, transformers 5 on SDPA lets
them see each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.errors import ModelError

ATTENTION = "tunesmith_varlen"
BOUNDS = "cu_seq_lens_q"
_packed: ContextVar[bool] = ContextVar("tunesmith_packed", default=False)


class Flatten(DataCollatorWithFlattening):
    """transformers' flattening collator with row bounds; rows are `input_ids` and `labels`.

    A row may itself be several examples (packing to a length): its `lengths` column then gives theirs.
    """

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True)

    def __call__(self, features: Sequence[Mapping[str, Any]], **kwargs: Any) -> dict[str, Any]:
        rows = [row for feature in features for row in _split(feature)]
        return super().__call__(rows, return_tensors="pt", **kwargs)


def _split(feature: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    lengths = feature.get("lengths") or [len(feature["input_ids"])]
    rows, start = [], 0
    for length in lengths:
        stop = start + length
        rows.append({key: list(feature[key][start:stop]) for key in ("input_ids", "labels")})
        start = stop
    return rows


def segments(batch: Mapping[str, Any]) -> Tensor:
    """The number of the row that each token belongs to, counted over the batch; -1 for padding. (B, T) int64."""
    ids = batch["input_ids"]
    if BOUNDS in batch:
        lengths = batch[BOUNDS].diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)[None]
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    mask = batch.get("attention_mask")
    return rows if mask is None else rows.masked_fill(mask == 0, -1)


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Real tokens of a batch, padding left out; a picture counts one."""
    if "input_ids" not in batch:
        return len(batch["labels"])
    return int((segments(batch) >= 0).sum())


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA within each row of a flattened batch; plain SDPA for any other batch.

    Args:
        module: The attention layer, as transformers passes it.
        query: (1, heads, N, dim); key and value (1, key heads, N, dim).
        attention_mask: Of an ordinary batch; None for a flattened one.
        cu_seq_lens_q: (S + 1,) int32, cumulated lengths of the rows.
        sliding_window: Of the layer, if it has one.

    Returns:
        (1, N, heads, dim), and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = _band(q.shape[2], sliding_window, q.device)
        out, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)
        parts.append(out)
    return torch.cat(parts, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, varlen_attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def enable(model: nn.Module) -> None:
    """Let the model take flattened batches; ordinary batches and `generate` go on as before.

    Raises:
        ModelError: the model cannot: its attention is not behind transformers' interface, or it does not hand the row
            bounds down to it. Found by running two short rows together and apart.
    """
    target = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(target.config, "_attn_implementation", None)
    try:
        target.set_attn_implementation(ATTENTION)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{type(target).__name__} does not take another attention function: {error}") from None
    handles = [
        target.register_forward_pre_hook(_enter, with_kwargs=True),
        target.register_forward_hook(_leave, always_call=True),
    ]
    apart = _leak(target)
    if apart is None or apart > 1e-3:
        for handle in handles:
            handle.remove()
        target.set_attn_implementation(before)
        found = "it does not run" if apart is None else f"logits differ by {apart:.2g}"
        raise ModelError(
            f"{type(target).__name__} cannot keep rows apart that are laid end to end ({found}); set "
            "`data.padding_free` to false to pad instead"
        )


def _enter(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    _packed.set(kwargs.get(BOUNDS) is not None)


def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    _packed.set(False)


def _leak(model: nn.Module) -> float | None:
    """The largest difference that laying two rows end to end makes to their logits, relative to their size."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([3, 5, 7, 4, 6], [6, 4, 5])]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            together = to_device(Flatten()(rows), device)
            joined = model(**{k: v for k, v in together.items() if k != "labels"}).logits[0]
            apart = [model(input_ids=torch.tensor([row["input_ids"]], device=device)).logits[0] for row in rows]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    finally:
        model.train(was)
    expected = torch.cat(apart).float()
    return float((joined.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on a device; other entries unchanged."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
