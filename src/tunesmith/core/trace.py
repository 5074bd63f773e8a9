"""The trace of a zeroth-order run: the seeds that it tried and what it found. Its start and this give its end.

16 bytes per step of one probe, whatever the model's size; `core.directions` draws the directions again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tunesmith.core.directions import Directions, descend_
from tunesmith.core.files import staged_file
from tunesmith.errors import CheckpointError

_FORMAT = "tunesmith.trace/1"


def _columns() -> dict[str, list[Any]]:
    return {"seeds": [], "coefficients": [], "ends": [], "since": [], "rates": []}


@dataclass
class Trace:
    """A run as the seeds that it tried and the coefficients that it found: theta_0 and this give theta_T.

    Attributes:
        fingerprint: Of the directions.
        columns: Lists of numbers: `seeds` and `coefficients` of all probes; `ends`, for each step the number of probes
            up to its end; `rates`, learning rates and then decays per group, each row valid from the step in `since`.
        base: `Directions.contents` of what the run began with; empty before its first step.
    """

    fingerprint: dict[str, Any]
    columns: dict[str, list[Any]] = field(default_factory=_columns)
    base: str = ""

    def __len__(self) -> int:
        """Steps."""
        return len(self.columns["ends"])

    def record(self, moves: Sequence[tuple[int, float]], lr: Sequence[float], decay: Sequence[float]) -> None:
        """Add one step: (seed, coefficient) of its probes, and the rates of the groups."""
        kept, rates = self.columns, [*lr, *decay]
        if not kept["rates"] or kept["rates"][-1] != rates:
            kept["since"].append(len(kept["ends"]))
            kept["rates"].append(rates)
        kept["seeds"] += [seed for seed, _ in moves]
        kept["coefficients"] += [coefficient for _, coefficient in moves]
        kept["ends"].append(len(kept["seeds"]))

    def replay_(self, groups: Sequence[Mapping[str, Any]], steps: int | None = None) -> None:
        """Turn the parameters that the run began with into those that it ended with, without a forward pass.

        Args:
            groups: The parameter groups of the run.
            steps: How many; all if not given.

        Raises:
            CheckpointError: the tensors, what they hold, or the device are not those of the run; or it has fewer steps.
        """
        if steps is not None and not 0 <= steps <= len(self):
            raise CheckpointError(f"the trace has {len(self)} steps; steps={steps} is not among them")
        was = self.fingerprint
        directions = Directions(groups, block_size=was["block_size"], noise=was["noise"])
        now = directions.fingerprint()
        for key in was:
            if was[key] != now[key]:
                raise CheckpointError(
                    f"the trace was recorded with {key} {was[key]!r} and cannot be replayed with {now[key]!r}; give "
                    "the parameter groups of the run, on the same kind of device (or record with noise='cpu')"
                )
        if self.base and (found := directions.contents()) != self.base:
            raise CheckpointError(
                f"the trace belongs to a model whose weights have the fingerprint {self.base}; these have {found}. "
                "Give the model that the run began with, in its dtype"
            )
        kept, row, begin = self.columns, -1, 0
        for step, end in enumerate(kept["ends"][:steps]):
            if row + 1 < len(kept["since"]) and kept["since"][row + 1] == step:
                row += 1
            rates = kept["rates"][row]
            half = len(rates) // 2
            moves = list(zip(kept["seeds"][begin:end], kept["coefficients"][begin:end], strict=True))
            descend_(directions, moves, rates[:half], rates[half:])
            begin = end

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: 16 bytes per step of one probe, and the rates where they change."""
        kept = self.columns
        tensors = {
            "seeds": torch.tensor(kept["seeds"], dtype=torch.int64),
            "coefficients": torch.tensor(kept["coefficients"], dtype=torch.float32),
            "ends": torch.tensor(kept["ends"], dtype=torch.int32),
            "since": torch.tensor(kept["since"], dtype=torch.int32),
            "rates": torch.tensor(kept["rates"], dtype=torch.float64),
        }
        with staged_file(path) as staging:
            about = {"format": _FORMAT, "fingerprint": json.dumps(self.fingerprint), "base": self.base}
            save_file(tensors, staging, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or is not a trace.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != _FORMAT:
                    raise CheckpointError(f"{path}: expected a {_FORMAT} file, found the format {meta.get('format')!r}")
                columns = {name: file.get_tensor(name).tolist() for name in _columns()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected a {_FORMAT} file; it cannot be read ({error})") from error
        return cls(json.loads(meta["fingerprint"]), columns, meta.get("base", ""))
