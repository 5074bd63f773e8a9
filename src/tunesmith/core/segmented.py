"""Losses of labelled tokens, whose logits are computed some at a time and never exist all at once.

The output head is replaced, for one forward pass, by one that gives the loss of each label in the place of its logits:
the product with the vocabulary and the cross-entropy run on `size` tokens, and again in the backward pass. What wraps
the model (several processes, autocast, shards) sees an ordinary forward pass.

A plain linear head in single or double precision goes to `torch.nn.functional.linear_cross_entropy`, whose one buffer
is size x vocabulary. Any other (half precision, where that function rounds losses and their gradient to half; a head
with an adapter; quantised) runs as it is, under activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from tunesmith.core.loss import IGNORED, labelled, model_inputs, targets_of, token_losses
from tunesmith.errors import ModelError


def segmented_losses(model: nn.Module, batch: Mapping[str, Any], size: int) -> Tensor:
    """-log p of each label of a causal batch, (n,) float32, in reading order; float64 for a model in float64.

    What `token_losses(labelled(model, batch))` gives, to rounding. A model that has no output head to get hold of
    (`get_output_embeddings`) computes its logits all at once, with a warning.

    Args:
        model: A causal language model, maybe wrapped.
        batch: With `input_ids` and `labels`, padded or flattened.
        size: Tokens at a time.

    Raises:
        ModelError: the model does something to its logits after the head (a soft cap, a scale).
    """
    base = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    find = getattr(base, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        logging.get_logger(__name__).warning_once(
            f"{type(base).__name__} has no output head to get hold of: its logits are computed all at once"
        )
        return token_losses(labelled(model, batch))
    targets = targets_of(batch)
    keep = (targets != IGNORED).any(0).nonzero()[:, 0]
    wanted = targets[:, keep]
    with _losing(head, wanted, keep, size) as made:
        given: Any = model(**model_inputs(batch), logits_to_keep=keep, use_cache=False).logits
    if not made:
        raise ModelError(f"{type(base).__name__} computed its logits without its output head ({type(head).__name__})")
    if given.shape != made[-1].shape or not torch.equal(given.to(made[-1].dtype), made[-1]):
        raise ModelError(
            f"{type(base).__name__} changes its logits after the output head (a soft cap or a scale); its loss cannot "
            "be computed in segments, use the objective `sft`"
        )
    found: Tensor = given[..., 0][wanted != IGNORED]
    return found


@contextmanager
def _losing(head: nn.Module, targets: Tensor, keep: Tensor, size: int) -> Iterator[list[Tensor]]:
    """The head gives (B, k, 1) losses instead of logits, 0 where there is no label; what it gave is in the list."""
    before, original, made = head.__dict__.get("forward"), head.forward, []

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[1] != len(keep):  # a model that does not know `logits_to_keep`
            hidden = hidden[:, keep]
        at = targets != IGNORED
        losses = _losses(head, original, hidden[at], targets[at], size)
        out = losses.new_zeros(at.shape).masked_scatter(at, losses)[..., None]
        made.append(out.detach())
        return out

    head.forward = forward
    try:
        yield made
    finally:
        # Another library may have replaced the forward of this instance before.
        if before is None:
            del head.forward
        else:
            head.forward = before


def _losses(head: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, size: int) -> Tensor:
    if len(labels) and _is_plain(head, hidden):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
        plain = cast(nn.Linear, head)
        return F.linear_cross_entropy(
            hidden, plain.weight, labels, linear_bias=plain.bias, reduction="none", options=options
        )

    def some(x: Tensor, y: Tensor) -> Tensor:
        logits = run(x)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")

    parts = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.cat([checkpoint(some, x, y, use_reentrant=False) for x, y in parts])


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and hidden.dtype == head.weight.dtype
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(hidden.device.type)
        and not (head._forward_hooks or head._forward_pre_hooks or "_hf_hook" in head.__dict__)
    )
