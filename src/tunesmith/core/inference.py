"""The inference contract: a cheaper forward pass of a loaded model, attached and taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn


class Inference(ABC):
    """Changes how a model is run, not its weights. Options are keyword-only parameters of `__init__`.

    Where a model must be tuned to bear the cheaper pass, the attached model trains with it too.

    Attributes:
        neutral: Options under which the attached model equals the plain one.
    """

    neutral: ClassVar[Mapping[str, object]] = {}

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Change the model's forward pass.

        Raises:
            ModelError: the model's architecture does not allow it; the reason is named.
        """

    @abstractmethod
    def detach(self) -> None:
        """Put the plain forward pass back, exactly."""
