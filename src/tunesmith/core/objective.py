"""The objective contract: `(model, batch) -> loss, scalars`.

An objective owns its teacher, reference or reward if it has one. Its loss is a sum over what it counts (labels, say,
or sequences) divided by a total, and it says how much of that a batch holds: the trainer adds the counts of all
micro-batches and processes of an optimizer step and hands the total back, so that gradient accumulation and several
processes give the gradient of one large batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tunesmith.core.loss import IGNORED, count_labels

Batch = Mapping[str, Any]


class Objective(ABC):
    """What is minimised. Options are keyword-only parameters of `__init__`."""

    def count(self, batch: Batch) -> Tensor:
        """What the batch contributes to the total that the loss is divided by, (); labels unless overridden.

        One number for each term: what would have several divisors counts rows.
        """
        return count_labels(batch)

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and figures to log.

        Args:
            model: In training mode; may be wrapped for several processes.
            batch: Padded or flattened, with `labels`.
            total: Count over the whole optimizer step; the batch's own if None.

        Returns:
            The loss, () float32, differentiable; and detached scalars by name.
        """

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Entered around the forward pass of the main objective, for a regulariser that needs what that computes.

        A regulariser puts its hooks on here and takes them off again; its own call, right afterwards, then need not
        run the model. The main objective may run the model more than once: the last pass counts. Keep outputs in the
        hooks and compute in the call, since a checkpointed block that runs again must save the same tensors. Called
        without `watching`, a regulariser runs the model itself.
        """
        yield

    def share(self, batch: Batch, total: Tensor | None) -> Tensor:
        """The divisor: `total`, or this batch's own count, never below one."""
        return (self.count(batch) if total is None else total).clamp_min(1)


class ModelLoss(Objective):
    """The loss that a transformers model returns, for tasks whose labels are not shifted: a mean over its labels."""

    def count(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return model(**batch).loss * self.count(batch) / self.share(batch, total), {}
