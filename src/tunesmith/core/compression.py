"""The compression contract: a model in place, block after block, from calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tunesmith.core.report import Report


class Compressor(ABC):
    """A way to make a model's weights smaller. Options are keyword-only parameters of `__init__`."""

    @abstractmethod
    def __call__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Report:
        """Change the model in place.

        Args:
            model: Kept in its dtype; names and shapes of its tensors do not change unless the method says so.
            batches: Calibration batches, as keyword arguments of the model; padding is left out by its mask.

        Returns:
            What was done to each layer, and its cost.
        """
