"""Logits and losses only where a label is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.packing import segments

IGNORED = -100


@dataclass(frozen=True)
class Labelled:
    """The labelled positions of a causal batch, n of them, in reading order.

    Attributes:
        logits: (n, vocabulary), the model's own dtype; position t's logits predict the label at t + 1.
        labels: (n,) int64.
        segment: (n,) int64, the row of the batch each label belongs to, flattened batches included.
        index: (n, 2) int64, row and column of the label in the batch.
    """

    logits: Tensor
    labels: Tensor
    segment: Tensor
    index: Tensor


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels: what goes into a forward pass whose loss is taken outside."""
    return {key: value for key, value in batch.items() if key != "labels"}


def targets_of(batch: Mapping[str, Any]) -> Tensor:
    """The label that each position but the last predicts, (B, T - 1) int64; IGNORED where there is none.

    The first token of a row has none, wherever in the batch the row begins: neither padding before it nor another
    row's end predicts it. Padding has none either.
    """
    row = segments(batch)
    targets: Tensor = batch["labels"][:, 1:]
    return targets.masked_fill((row[:, 1:] != row[:, :-1]) | (row[:, 1:] < 0), IGNORED)


def labelled(model: nn.Module, batch: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Labelled:
    """Run a causal model and keep the logits that a label is predicted from.

    The model computes no other logits (`logits_to_keep`), which saves the vocabulary-sized product for prompts.

    Args:
        model: A causal language model.
        batch: With `input_ids` and `labels`, padded or flattened.
        inputs: What to run the model on instead of the batch's own inputs (`inputs_embeds`, say).
    """
    targets = targets_of(batch)
    row, column = (targets != IGNORED).nonzero(as_tuple=True)
    keep, place = column.unique(return_inverse=True)
    given = dict(model_inputs(batch) if inputs is None else inputs)
    out = model(**given, logits_to_keep=keep, use_cache=False).logits
    if out.shape[1] != len(keep):  # a model that does not know `logits_to_keep`
        out = out[:, keep]
    logits = out[0] if out.shape[0] == 1 else out[row, place]
    label_segments = segments(batch)[:, 1:]
    index = column.new_empty(len(column), 2)
    index[:, 0], index[:, 1] = row, column + 1
    return Labelled(logits, targets[row, column], label_segments[row, column], index)


def token_losses(found: Labelled) -> Tensor:
    """-log p of each label, (n,) float32; float64 for a model in float64."""
    logits = found.logits.to(torch.promote_types(found.logits.dtype, torch.float32))
    return F.cross_entropy(logits, found.labels, reduction="none")


def count_labels(batch: Mapping[str, Any]) -> Tensor:
    """The number of labels that a causal batch has, ()."""
    return (targets_of(batch) != IGNORED).sum()
