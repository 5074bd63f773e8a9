"""`tunesmith merge`: models by name in, one model folder out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tunesmith.core.merging import Judges, Merge, State, merged
from tunesmith.core.statedict import write
from tunesmith.engine import evaluate
from tunesmith.engine.batches import BATCH, encoded
from tunesmith.engine.subjects import base_of, checkpoint
from tunesmith.errors import CheckpointError
from tunesmith.models.loader import Loaded, load_model, resolve

MAX_LENGTH = 1024


def merge_models(
    method: Merge, names: Sequence[str], output: Path, *, base: str | None = None, data: str | None = None
) -> Path:
    """Merge models (folders, runs, adapters, hub ids) into a model folder with config, tokenizer and a record.

    Raises:
        CheckpointError: as `core.merging.merged`; nothing is written then.
        ModelError, DataError: a model or the validation rows cannot be read.
    """
    models = [checkpoint(name) for name in names]
    original = None if base is None else checkpoint(base)
    like = Path(_folder(base or names[0]))
    judges = _judges(load_model(base or names[0], dtype="float32"), data) if data is not None else Judges()
    tensors = merged(method, models, original, judges)

    def record(folder: Path) -> None:
        made = {"method": type(method).__name__, "models": list(names), "base": base, **method.record()}
        (folder / "merge.json").write_text(json.dumps(made, indent=2, default=str) + "\n", encoding="utf-8")

    return write(output, tensors, like=like, extra=record)


def _folder(name: str) -> str:
    """The folder whose config and tokenizer the merged model gets."""
    source = resolve(base_of(name) or name)
    if not Path(source).is_dir():
        raise CheckpointError(f"{name} comes from the hub; merge from folders, so that their config can be copied")
    return source


def _judges(loaded: Loaded, data: str) -> Judges:
    """Score (accuracy, or minus the loss) and differentiable loss of a set of weights on validation rows."""
    rows_of = encoded(loaded, data, MAX_LENGTH)
    rows = [*rows_of.train, *rows_of.eval]
    model: Any = loaded.model

    def score(state: State) -> float:
        missing = model.load_state_dict(dict(state), strict=False).missing_keys
        unknown = [name for name in missing if name not in getattr(model, "_tied_weights_keys", ())]
        if unknown:
            raise CheckpointError(f"the merged weights lack {unknown[0]!r}")
        found = evaluate.metrics(model, rows, rows_of.collator, loaded.task, BATCH)
        values = [metrics.get("accuracy", -metrics["loss"]) for metrics in found.values()]
        return sum(values) / len(values)

    def loss(state: State) -> Tensor:
        losses = []
        for start in range(0, len(rows), BATCH):
            batch = rows_of.collator(rows[start : start + BATCH])
            losses.append(functional_call(model, dict(state), (), batch).loss)
        return torch.stack(losses).mean()

    scored: Callable[[State], float] = score
    return Judges(scored, loss)
