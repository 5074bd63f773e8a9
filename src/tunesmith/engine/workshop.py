"""The workshop of a pipeline: trainings in folders of their own, models to ask, rows that stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset
from rich.console import Console
from rich.progress import track

from tunesmith import inputs
from tunesmith import report as reports
from tunesmith.core.files import staged_folder
from tunesmith.core.pipeline import Opened, Trained, Workshop
from tunesmith.core.report import Report
from tunesmith.engine.evaluate import answers, question
from tunesmith.engine.run_folder import RunFolder
from tunesmith.errors import DataError, RecipeError
from tunesmith.inputs.store import GROUP, WHERE
from tunesmith.models import loader
from tunesmith.recipe import Recipe, Task, load

T = TypeVar("T")
_ROWS = "rows"
_MAPPED = ("train", "eval", "eval_fraction", "columns", "skip_bad_rows")
"""Fields of `data` that are settled once the rows are checked."""


class Bench(Workshop):
    """A workshop in a folder.

    Args:
        folder: Of the pipeline.
        recipe: Of a single training.
        run: `tunesmith.run`.
        quiet: No progress and no messages.
    """

    def __init__(self, folder: Path, recipe: Recipe, run: Callable[..., Report], *, quiet: bool) -> None:
        self.folder, self.base, self._run, self.quiet = folder, recipe, run, quiet
        self.recipe, self.seed = recipe.model_dump(mode="json"), recipe.train.seed
        self.console = Console(stderr=True, quiet=quiet)
        self.source = loader.resolve(recipe.model.name)
        self.config = loader.read_config(self.source, recipe.model.trust_remote_code)
        self._keep_rows()

    def _keep_rows(self) -> None:
        """The checked rows as a `datasets` folder, so that every training has the same and none checks them again."""
        kept = self.folder / _ROWS
        if not kept.exists():
            gathered = inputs.gather(self.base.data, config=self.config, task=self.base.task, verbose=not self.quiet)
            with staged_folder(kept) as staging:
                for name, rows in (("train", gathered.train), ("eval", gathered.eval)):
                    _plain(rows.dataset, gathered.labels).save_to_disk(str(staging / name))
                (staging / "task").write_text(gathered.task, encoding="utf-8")
        self.task: Task = (kept / "task").read_text(encoding="utf-8")  # type: ignore[assignment]
        self._rows, self._held_out = (Dataset.load_from_disk(str(kept / name)) for name in ("train", "eval"))

    @property
    def rows(self) -> Dataset:
        return self._rows

    @property
    def held_out(self) -> Dataset:
        return self._held_out

    def _settled(self, train: Path, overrides: Mapping[str, Any], output: Path) -> Recipe:
        content = self.base.model_dump(exclude_unset=True)
        data = {k: v for k, v in content.get("data", {}).items() if k not in _MAPPED}
        kept = self.folder / _ROWS
        content["data"] = {**data, "train": str(train), "eval": str(kept / "eval"), "max_eval_rows": len(self.held_out)}
        return load(content | {"task": self.task}, {**overrides, "output": str(output)})

    def train(self, name: str, rows: Dataset | None = None, **overrides: Any) -> Trained:
        folder = self.folder / name
        source = self.folder / _ROWS / "train"
        if rows is not None:
            source = self.files(f"{_ROWS}-{name}", lambda place: rows.save_to_disk(str(place)))
        recipe = self._settled(source, overrides, folder)
        report = folder / reports.JSON_NAME
        if not report.exists():
            held = RunFolder(folder)
            self.say(f"{name}: training on {len(self.rows if rows is None else rows)} rows")
            going = held.recipe.exists() and held.produced
            self._run(recipe, resume=going, overwrite=held.recipe.exists() and not going, quiet=self.quiet)
        return Trained(folder, folder / "model", reports.load(report))

    def open(self, model: Path | None = None) -> Opened:
        spec = self.base.model
        if model is None:
            labels = self._labels()
            base = loader.load_base(
                self.source,
                self.task,
                dtype=spec.dtype,
                quantization=spec.quantization,
                labels=labels,
                trust_remote_code=spec.trust_remote_code,
            )
            processor = loader.load_processor(self.source, self.task, spec.trust_remote_code)
        else:
            opened = loader.load_model(str(model), task=self.task)
            base, processor = opened.model, opened.processor
        base.eval()
        device = next(base.parameters()).device

        def encoded(rows: Dataset) -> inputs.Encoded:
            if self.task.endswith("classification"):
                rows = rows.cast_column("label", self.rows.features["label"])
            with _folder_of(rows, self.folder) as place:
                recipe = self._settled(place, {"data.eval": str(place), "data.too_long": "truncate"}, self.folder)
                data = inputs.prepare(recipe.data, config=base.config, processor=processor, task=self.task)
                if len(data.train) != len(rows):
                    raise DataError(f"{len(rows) - len(data.train)} of {len(rows)} rows cannot be encoded")
                return data

        def batches(rows: Dataset, size: int) -> list[dict[str, Any]]:
            from tunesmith.core.packing import to_device

            data = encoded(rows)
            every = [data.train[i] for i in range(len(rows))]
            return [to_device(data.collator(every[i : i + size]), device) for i in range(0, len(every), size)]

        def ask(rows: Dataset) -> list[str]:
            data = encoded(rows)
            asked = [question(data.train[i], self.task) for i in range(len(rows))]
            if any(q is None for q in asked):
                raise DataError("a row has no prompt that could be answered; it is plain text")
            return answers(
                base,
                processor,
                [q[0] for q in asked if q],
                max_new_tokens=self.base.report.max_new_tokens,
                batch_size=max(self.base.train.batch_size, 16),
                task=self.task,
                limit=data.limit,
            )

        return Opened(base, processor, batches, ask)

    def _labels(self) -> list[str] | None:
        kind = self.rows.features.get("label")
        return list(kind.names) if isinstance(kind, ClassLabel) else None

    def track(self, steps: Iterable[T], title: str) -> Iterable[T]:
        return track(steps, title, console=self.console, disable=self.quiet, transient=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _plain(rows: Dataset, labels: list[str] | None) -> Dataset:
    """Checked rows as a user would give them: our own columns under our names."""
    rows = rows.remove_columns([name for name in (WHERE,) if name in rows.column_names])
    if GROUP in rows.column_names:
        rows = rows.rename_column(GROUP, "family")
    if labels is not None and "label" in rows.column_names:
        rows = rows.cast_column("label", ClassLabel(names=labels))
    return rows


@contextmanager
def _folder_of(rows: Dataset, beside: Path) -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix=".partial-asked-", dir=beside) as place:
        rows.save_to_disk(f"{place}/rows")
        yield Path(place) / "rows"


def check_task(who: str, tasks: tuple[str, ...], task: str) -> None:
    """Raise `RecipeError` unless a pipeline can run on the task."""
    if task not in tasks:
        raise RecipeError(f"{who} runs on {', '.join(tasks)}; the rows are for {task}")
