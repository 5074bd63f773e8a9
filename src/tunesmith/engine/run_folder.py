"""The folder of a run: what is in it, whose it is, and where a killed run goes on.

recipe.yaml            what was asked; a folder belongs to one recipe
checkpoints/           checkpoint-N, each complete or absent
before.json            what was measured before training
trace.safetensors      of an optimizer that keeps a trace for checkpoints: what `tunesmith replay` reads
model/                 the result: a PEFT adapter folder or a transformers model folder
report.json, .html     what was measured
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tunesmith.core.files import remove_staging, write_text
from tunesmith.core.trainer import TRACE_FILE
from tunesmith.errors import CheckpointError
from tunesmith.recipe import Recipe, load

_SAME = (
    "model",
    "data",
    "task",
    "method",
    "adapters",
    "prompts",
    "schedule",
    "optimizer",
    "objective",
    "regularisers",
    "inference",
)
"""Fields in which a resumed run must agree with the one that was begun; so must those of `train` below."""
_SAME_TRAIN = (
    "steps",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "weight_decay",
    "lr_schedule",
    "warmup",
    "max_grad_norm",
    "precision",
    "seed",
)


class RunFolder:
    """One run's folder.

    Args:
        path: Of the folder; made when opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.before = self.path / "before.json"
        self.model = self.path / "model"
        self.trace = self.path / TRACE_FILE

    def open(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
        """Claim the folder for `recipe`; returns the checkpoint to go on from, None to begin.

        Raises:
            CheckpointError: the folder holds another run, or something that is not a run, or nothing to resume; or it
                cannot be written to. A run that stopped before it had anything to lose is replaced.
            RecipeError: the recipe that it holds cannot be read.
        """
        if not resume and self.recipe.exists() and (overwrite or not self.produced):
            self._clear()
        elif self.recipe.exists():
            self._check_same(recipe)
            if not resume:
                raise CheckpointError(
                    f"{self.path} holds a run of this recipe already. Go on with it by --resume, replace it by "
                    "--overwrite, or name another --output."
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            held = ", ".join(sorted(p.name for p in self.path.iterdir())[:5])
            raise CheckpointError(
                f"{self.path} is not empty and not the folder of a run ({held}); name another --output"
            )
        elif resume:
            raise CheckpointError(f"there is no run to resume in {self.path}; leave out --resume to begin one")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            recipe.to_yaml(self.recipe)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written to ({error.strerror}); name another --output"
            ) from None
        for folder in (self.path, self.checkpoints):
            remove_staging(folder)
        return self.latest() if resume else None

    @property
    def produced(self) -> bool:
        """Whether the run has come to anything: a checkpoint, a model, a report."""
        return self.latest() is not None or self.model.exists() or (self.path / "report.json").exists()

    def latest(self) -> Path | None:
        """The checkpoint with the most steps; every one under its final name is complete."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)

    def begins_at(self, checkpoint: Path | None) -> bool:
        """Whether the model is made from nothing: there is no checkpoint, or one that holds a trace alone."""
        return checkpoint is None or (checkpoint / TRACE_FILE).exists()

    def save_before(self, content: dict[str, Any]) -> None:
        """Keep what was measured before training, for the report of a resumed run."""
        write_text(self.before, json.dumps(content))

    def load_before(self) -> dict[str, Any] | None:
        """What was measured before training, if it was finished."""
        return json.loads(self.before.read_text(encoding="utf-8")) if self.before.exists() else None

    def _clear(self) -> None:
        for folder in (self.checkpoints, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        # The recipe goes last: it is what tells that the rest is a run, should this be interrupted.
        for name in ("before.json", "report.json", "report.html", TRACE_FILE, "recipe.yaml"):
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self, recipe: Recipe) -> None:
        held = load(self.recipe)
        for field in _SAME:
            self._compare(field, getattr(held, field), getattr(recipe, field))
        for field in _SAME_TRAIN:
            self._compare(f"train.{field}", getattr(held.train, field), getattr(recipe.train, field))

    def _compare(self, field: str, held: Any, asked: Any) -> None:
        if held != asked:
            raise CheckpointError(
                f"{self.path} holds another run: its {field} is {_short(held)}, this recipe's is {_short(asked)}. Name "
                "another --output, or replace that run by --overwrite."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
