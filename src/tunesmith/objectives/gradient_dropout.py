"""Gradient dropout: fine-tuning in which masks learn from a gradient entry only as far as the original model agrees.

The gradient-dropout regularity (GDR) of Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in
Pre-trained Vision-Language Models", ICCV 2023 (section 3.3), for the scores M of `mask-tuning`:

    a = d/dM (CE + norm * sum over the layers of |M|_2),   b = d/dM T^2 CE(softmax(z0 / T), log_softmax(z / T))
    P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2,   U ~ U(0, 1)
    gradient = ((1 - lam) + lam 1[P > U]) a

with z the logits and z0 those of the original model, masks switched off. b is never applied: it only says how much of a
is kept. Where both have one sign P is 1; where b pulls back as strongly as a pulls, 1/2; where it is stronger, less.

Each micro-batch has its own draw, as the paper's only batch has. What else trains, a new head say, gets its plain
gradient. The loss is that of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from peft import PeftModel
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED, count_labels, labelled
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.part import part
from tunesmith.core.reference import reference
from tunesmith.core.steps import in_force
from tunesmith.errors import DataError

Share = Annotated[float, Field(ge=0, le=1)]


@part(
    paper="arXiv:2307.15049",
    refuses={
        "full-finetuning": "it compares with the model below the masks of mask-tuning, and there are none",
        "forward-only": "it changes gradients",
        "encoder-decoder": "it compares labels with the logits before them or of the whole row",
    },
)
class GradientDropout(Objective):
    """The task's cross-entropy, for models with the masks of `mask-tuning`; without any it is plain fine-tuning.

    Args:
        lam: Strength; 0 keeps every entry.
        temperature: T.
        norm: Weight of the sum of the scores' Euclidean norms.
    """

    def __init__(self, *, lam: Share = 1.0, temperature: PositiveFloat = 1.0, norm: NonNegativeFloat = 1e-4) -> None:
        self.lam, self.temperature, self.norm = lam, temperature, norm

    def count(self, batch: Batch) -> Tensor:
        """Labels: tokens of a causal model, rows of a classifier, ()."""
        labels = batch["labels"]
        if labels.is_floating_point() or labels.dim() not in (1, 2):
            raise DataError(
                f"gradient-dropout compares distributions over classes or tokens; found labels of {labels.dtype}, "
                f"shape {tuple(labels.shape)}"
            )
        return count_labels(batch) if labels.dim() == 2 else (labels != IGNORED).sum()

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss, with the gradients above.

        Returns:
            The loss, () float32; `kept`, the share of the scores' gradient entries that stayed, and `divergence` from
            the original model, per label.

        Raises:
            DataError: labels that are no classes or tokens.
        """
        share = self.share(batch, total)
        logits, labels = _predicted(model, batch)
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / share
        found = (getattr(made, "scores", None) for made in in_force(model))
        scores = [M for M in found if isinstance(M, nn.Parameter)]
        if not scores or not torch.is_grad_enabled():
            return loss, {}
        with reference(model) as original:
            teacher = _predicted(original, batch)[0]
        T, seen = self.temperature, labels != IGNORED
        apart = F.cross_entropy(logits[seen] / T, (teacher[seen] / T).softmax(-1), reduction="sum") * T**2 / share
        rows = self.count(batch) / share  # the norms once per step, however many micro-batches
        task = loss + self.norm * rows * torch.stack([_norm(M) for M in scores]).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        a = torch.autograd.grad(task, trained, retain_graph=True, allow_unused=True)
        b = dict(zip(map(id, scores), torch.autograd.grad(apart, scores, allow_unused=True), strict=True))
        with torch.no_grad():
            pairs = [(M, g) for M, g in zip(trained, a, strict=True) if id(M) in b and g is not None]
            held = {id(M): self._keep(g, b[id(M)]) for M, g in pairs}
            gradients = [
                torch.zeros_like(p) if g is None else g * held[id(p)] if id(p) in held else g
                for p, g in zip(trained, a, strict=True)
            ]
            kept = sum(float((m > 1 - self.lam).sum()) for m in held.values()) / sum(m.numel() for m in held.values())
        scalars = {"kept": loss.new_tensor(kept), "divergence": (apart * share / self.count(batch)).detach()}
        return _with_gradients(loss, trained, gradients), scalars

    def _keep(self, a: Tensor, b: Tensor | None) -> Tensor:
        """The factor of each entry, 1 - lam or 1."""
        P = agreement(a, torch.zeros_like(a) if b is None else b)
        return (1 - self.lam) + self.lam * (torch.rand_like(P) < P).to(a.dtype)


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """P, the probability that an entry of a is kept: 1 where b agrees, less where it pulls the other way."""
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs()).clamp_min(torch.finfo(a.dtype).tiny)) / 2


def _norm(scores: Tensor) -> Tensor:
    # The norm has no gradient at 0, and a mask whose scores are all 0 has none to be pulled.
    return scores.square().sum().clamp_min(torch.finfo(scores.dtype).tiny).sqrt()


def _predicted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits, labels): (n, vocabulary) and (n,) of labelled tokens, or (rows, classes) and (rows,)."""
    inner = getattr(model, "module", model)
    original = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    both = bool(getattr(getattr(original, "config", None), "is_encoder_decoder", False))
    if batch["labels"].dim() == 2 and not both:
        found = labelled(model, batch)
        logits, labels = found.logits, found.labels
    else:
        logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


def _with_gradients(loss: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A number equal to `loss` whose gradients are these."""
    carrier = torch.stack(
        [(p * g.to(p.dtype)).sum().to(loss.dtype) for p, g in zip(parameters, gradients, strict=True)]
    )
    return loss.detach() + carrier.sum() - carrier.sum().detach()
