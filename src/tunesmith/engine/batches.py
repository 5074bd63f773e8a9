"""Batches for what is not training: calibration of a compression, validation of a merge."""

from __future__ import annotations

from typing import Any, Literal

from tunesmith import inputs
from tunesmith.models.loader import Loaded
from tunesmith.recipe_fields import DataSpec

BATCH = 8


def encoded(
    loaded: Loaded, source: str | None, max_length: int, loss_on: Literal["completion", "all"] = "completion"
) -> inputs.Encoded:
    """The rows of a source, encoded for a loaded model; longer ones are cut. The embedded data if it names none."""
    spec = DataSpec(train=source, max_length=max_length, too_long="truncate", loss_on=loss_on)
    return inputs.prepare(spec, config=loaded.model.config, processor=loaded.processor, task=loaded.task)


def calibration(loaded: Loaded, source: str | None, rows: int, max_length: int) -> list[dict[str, Any]]:
    """Batches of at most `rows` rows, as keyword arguments of the model, without labels."""
    # A row whose answer is cut off has no label left to learn from, and is as good for this as any other.
    data = encoded(loaded, source, max_length, loss_on="all")
    chosen = [data.train[i] for i in range(min(rows, len(data.train)))]
    batches = [data.collator(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
