"""Batches: rows padded to the longest, rows laid end to end, pictures; and packing several rows into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import pack_dataset

from tunesmith.core.loss import IGNORED
from tunesmith.inputs import images
from tunesmith.inputs.store import scratch

_PACKED_TOGETHER = 10_000


@dataclass(frozen=True)
class Pad:
    """Rows with `input_ids` and `labels`, padded on the right.

    The attention mask comes from the rows' lengths, never from the token: where the end-of-sequence token stands in for
    padding, a row's own end stays visible and keeps its label.

    Attributes:
        pad: The token to pad inputs with.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, T) int64; `labels` (B, T), (B, targets) or, of classes, (B,) int64."""
        labels = [row["labels"] for row in rows]
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": _padded(ids, self.pad),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": torch.tensor(labels) if isinstance(labels[0], int) else _padded(labels, IGNORED),
        }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for at, row in enumerate(rows):
        out[at, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out


@dataclass(frozen=True)
class Pictures:
    """Rows with `image` and `labels`; each picture is opened when its batch is made.

    Attributes:
        processor: The model's image processor.
        mode: "RGB", or "L" for models with one channel.
    """

    processor: Any
    mode: str = "RGB"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` (B, channels, height, width) float32, `labels` (B,) int64."""
        opened = [images.opened(row["image"], self.mode) for row in rows]
        pixels = self.processor(opened, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def pack(rows: Dataset, limit: int, folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """Rows put together up to `limit` tokens by best-fit decreasing (TRL's), ten thousand at a time.

    Returns:
        Rows with `input_ids`, `labels` and `lengths`, as `core.packing.Flatten` takes them; and how full they are.
    """
    packed = pack_dataset(
        rows.select_columns(["input_ids", "labels"]),
        limit,
        "bfd",
        {
            "batch_size": _PACKED_TOGETHER,
            "cache_file_name": scratch(folder, "packed"),
            "load_from_cache_file": False,
            "new_fingerprint": Path(scratch(folder, "fingerprint")).stem,
            "desc": "Packing",
        },
    ).rename_column("seq_lengths", "lengths")
    tokens = sum(sum(row["lengths"]) for row in packed.select_columns(["lengths"]))
    return packed, {
        "rows_before": len(rows),
        "rows": len(packed),
        "length": limit,
        "utilisation": round(tokens / (len(packed) * limit), 4),
    }
