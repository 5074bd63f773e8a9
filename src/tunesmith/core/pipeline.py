"""The pipeline contract: several trainings with decisions between them, as one resumable job.

A pipeline is given a recipe and a workshop. Everything that takes long or draws a conclusion happens in a named stage
of the workshop; a stage that was finished is not done again, so that a killed pipeline goes on where it stopped, and a
pipeline that is a function of its stages comes out the same.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.core.files import staged_file, staged_folder, write_text
from tunesmith.core.report import Report
from tunesmith.errors import CheckpointError, DataError

T = TypeVar("T")


class Pipeline(ABC):
    """A domain pipeline. Options are keyword-only parameters of `__init__`.

    Attributes:
        brisk: Options under which it ends within seconds on a tiny model, for tests.
        tasks: That it can run on.
    """

    brisk: ClassVar[Mapping[str, object]] = {}
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "seq2seq", "text-classification", "image-classification")

    @abstractmethod
    def run(self, workshop: Workshop) -> Report:
        """Do the whole job; what it is about is `workshop.recipe`."""


@dataclass(frozen=True)
class Trained:
    """A finished training of a pipeline.

    Attributes:
        folder: Of the run.
        model: Folder of the model or adapter.
        report: Of the run.
    """

    folder: Path
    model: Path
    report: Report

    def figure(self, name: str) -> float:
        """A figure of the report by its name, after training.

        Raises:
            CheckpointError: the report has no such number.
        """
        found = self.report.figures.get(name)
        if found is None or not isinstance(found.value, int | float):
            raise CheckpointError(
                f"{self.folder}: the report has no number {name!r}; it has {list(self.report.figures)}"
            )
        return float(found.value)


@dataclass(frozen=True)
class Opened:
    """A model of a pipeline, ready to be asked.

    Attributes:
        model: In evaluation mode; a PEFT model if it is an adapter.
        processor: Tokenizer or image processor.
        batches: `(rows, size) -> batches` with labels, in the rows' order, as keyword arguments of the model.
        answers: `(rows) -> texts`, greedy.
    """

    model: nn.Module
    processor: Any
    batches: Callable[[Dataset, int], list[dict[str, Any]]]
    answers: Callable[[Dataset], list[str]]


class Workshop(ABC):
    """What a pipeline works with.

    Attributes:
        folder: Everything that the pipeline leaves.
        recipe: The recipe of a single training, as plain data; `train` overrides fields of it.
        task: Of the rows.
        seed: Of the recipe.
    """

    folder: Path
    recipe: Mapping[str, Any]
    task: str
    seed: int

    @abstractmethod
    def train(self, name: str, rows: Dataset | None = None, **overrides: Any) -> Trained:
        """One training in `folder/name`, by the recipe with fields overridden (`**{"train.steps": 10}`).

        Finished before, its report is read; interrupted, it goes on from its last checkpoint.

        Args:
            name: Of the stage.
            rows: To train on instead of all training rows; the evaluation rows are the same in every training.
            overrides: Fields of the recipe by dotted name.
        """

    @abstractmethod
    def open(self, model: Path | None = None) -> Opened:
        """A model folder or adapter folder; None for the base model of the recipe."""

    @property
    @abstractmethod
    def rows(self) -> Dataset:
        """The training rows, checked, in the recipe's order."""

    @property
    @abstractmethod
    def held_out(self) -> Dataset:
        """The evaluation rows."""

    @abstractmethod
    def track(self, steps: Iterable[T], title: str) -> Iterable[T]:
        """The same, with a progress bar."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A line for whoever watches."""

    # Stages -------------------------------------------------------------------------------------------------------

    def do(self, name: str, work: Callable[[], T]) -> T:
        """Plain data (what JSON holds) that `work` makes, once.

        Raises:
            CheckpointError: what was kept cannot be read.
        """
        file = self.folder / "stages" / f"{name}.json"
        if file.exists():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file} is not JSON ({error}); delete it to do this stage again") from None
        found = work()
        write_text(file, json.dumps(found, allow_nan=False) + "\n")
        return json.loads(json.dumps(found))

    def tensors(self, name: str, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that `work` makes, once."""
        file = self.folder / "stages" / f"{name}.safetensors"
        if not file.exists():
            found = {key: value.detach().cpu().contiguous() for key, value in work().items()}
            with staged_file(file) as staging:
                save_file(found, staging)
        return load_file(file)

    def files(self, name: str, work: Callable[[Path], None]) -> Path:
        """The folder `name` that `work` fills, once; it has its name only when it is complete."""
        folder = self.folder / name
        if not folder.exists():
            with staged_folder(folder) as staging:
                work(staging)
        return folder

    def choose(self, indices: Sequence[int]) -> Dataset:
        """Some of the training rows.

        Raises:
            DataError: an index twice, or none.
        """
        if not indices or len(set(indices)) != len(indices):
            raise DataError(f"expected different rows to train on, found {len(indices)} of them")
        return self.rows.select(list(indices))
