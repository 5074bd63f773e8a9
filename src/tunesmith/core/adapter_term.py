"""Regularisers that are a sum over the adapters of a model and do not depend on the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED
from tunesmith.core.objective import Batch, Objective
from tunesmith.errors import ModelError


class AdapterTerm(Objective):
    """A sum of one term per layer. A micro-batch contributes it in proportion to its labels, so that an optimizer step
    has it once, however many micro-batches and processes there are. A model without any adapter has a term of 0.

    Attributes:
        logged: What the whole sum is called among the logged scalars.
        lacking: Said, as a sentence without its end, of a model whose adapters offer no term.
    """

    logged: ClassVar[str]
    lacking: ClassVar[str]

    @abstractmethod
    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """The term of each layer, (), differentiable, in the order of the model."""

    def count(self, batch: Batch) -> Tensor:
        """The number of labels, (); of rows, where there are no labels."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            return (labels != IGNORED).sum()
        first: Tensor = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.tensor(len(first), device=first.device)

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the term.

        Returns:
            The loss, (); and the whole sum under `logged`.

        Raises:
            ModelError: there are adapters, and none offers a term.
        """
        terms = list(self.terms(model))
        if not terms and any(isinstance(m, BaseTunerLayer) for m in model.modules()):
            raise ModelError(f"{self.lacking}; leave the regulariser out")
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        value = torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)
        return value * self.count(batch) / self.share(batch, total), {self.logged: value.detach()}
