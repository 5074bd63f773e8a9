"""How unsure a model is of rows: of their labels or of what it would answer itself, in one pass or under dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED, labelled, model_inputs
from tunesmith.core.seeds import forked

Kind = Literal["predictive", "entropy"]


@contextmanager
def dropping_out(model: nn.Module) -> Iterator[None]:
    """Dropout as in training, and nothing else of training: running statistics of norms stay."""
    was = {module: module.training for module in model.modules()}
    model.train()
    for module in was:
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
            module.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


@torch.no_grad()
def scores(model: nn.Module, batches: Sequence[Mapping[str, Any]], kind: Kind = "predictive") -> Tensor:
    """One number per row, (rows,) float64, larger where the model is less sure.

    Args:
        model: In the mode that the caller wants.
        batches: Keyword arguments of the model with labels: of classes (B,), or of tokens (B, T).
        kind: `predictive` is -log p of the labels, summed over a row's tokens; for classes, of the likeliest class.
            `entropy` is that of the predictions, summed over the labelled positions.
    """
    return torch.cat([_of_batch(model, batch, kind).double().cpu() for batch in batches])


def _of_batch(model: nn.Module, batch: Mapping[str, Any], kind: Kind) -> Tensor:
    labels = batch["labels"]
    if labels.dim() == 1:
        logp = F.log_softmax(model(**model_inputs(batch)).logits.float(), -1)
        return -logp.amax(-1) if kind == "predictive" else _entropy(logp)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        logp = F.log_softmax(model(**batch).logits.float(), -1)
        real = labels != IGNORED
        own = -logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return ((own if kind == "predictive" else _entropy(logp)) * real).sum(1)
    found = labelled(model, batch)
    logp = F.log_softmax(found.logits.float(), -1)
    each = _entropy(logp) if kind == "entropy" else -logp.gather(-1, found.labels[:, None])[:, 0]
    return torch.zeros(len(labels), device=each.device).index_add(0, found.segment, each)


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def under_dropout(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], kind: Kind, passes: int, *keys: int | str
) -> Tensor:
    """The scores of several passes under dropout, (passes, rows); the masks follow from the keys."""
    found = []
    with dropping_out(model):
        for k in range(passes):
            with forked(*keys, k, device=next(model.parameters()).device):
                found.append(scores(model, batches, kind))
    return torch.stack(found)
