"""The rows of a recipe's `data`: read, checked and split, before they are tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError
from tunesmith.inputs import default
from tunesmith.inputs.arrow import of_dataset
from tunesmith.inputs.columns import meaning, named
from tunesmith.inputs.labels import head_names
from tunesmith.inputs.rows import RawRows
from tunesmith.inputs.sources import read_rows
from tunesmith.inputs.split import duplicates, first, split
from tunesmith.inputs.store import Rows, progress, store
from tunesmith.inputs.task import check_task, infer_task

if TYPE_CHECKING:
    from tunesmith.recipe import Task
    from tunesmith.recipe_fields import DataSpec


@dataclass(frozen=True)
class Gathered:
    """Rows that have been read, checked and split, before they are tokens.

    Attributes:
        task: Given or inferred.
        train: Rows to learn from.
        eval: Rows kept for evaluation.
        retain: Rows of what the model knew before, if the recipe names some.
        labels: Class names in the order of their numbers; None where the task has no classes.
        report: Sources, bad rows, split and duplicates, as plain data.
        folder: Holds the rows' files; they are deleted with this object.
    """

    task: Task
    train: Rows
    eval: Rows
    retain: Rows | None
    labels: list[str] | None
    report: dict[str, Any]
    folder: TemporaryDirectory


def gather(spec: DataSpec, *, config: Any, task: Task | None = None, verbose: bool = False) -> Gathered:
    """Read, check and split; the arguments are those of `prepare`.

    Raises:
        DataError: names the source, the row, the field or the setting that is at fault.
    """
    folder = TemporaryDirectory(prefix="tunesmith-", ignore_cleanup_errors=True)
    with progress(verbose):
        raw, raw_eval = _sources(spec)
        if task is None:
            task = infer_task(config, named(raw, spec.columns))
        check_task(config, task)
        if spec.train is None and task not in ("causal-lm", "seq2seq"):
            raise DataError(f"data.train is not given, and the embedded data are no {task}. Name a file or folder.")
        return _gather(spec, raw, raw_eval, config, task, folder)


def _sources(spec: DataSpec) -> tuple[RawRows, RawRows | None]:
    skip = spec.skip_bad_rows
    if spec.train is None:
        learn, held_out = default.default_data(spec.split_seed)
        train = of_dataset(learn, default.NAME, "data.train", skip)
        train.held_out = of_dataset(held_out, f"{default.NAME} (held out)", "data.train", skip)
    else:
        train = read_rows(spec.train, skip_bad_rows=skip)
    given = read_rows(spec.eval, what="data.eval", skip_bad_rows=skip) if spec.eval is not None else None
    return train, given


def _gather(
    spec: DataSpec, raw: RawRows, raw_eval: RawRows | None, config: Any, task: Task, folder: TemporaryDirectory
) -> Gathered:
    place = Path(folder.name)

    def checked(rows: RawRows, labels: list[str] | None = None) -> Rows:
        return store(rows, meaning(rows, task, spec.columns), place, config=config, labels=labels)

    train = checked(raw)
    labels = train.labels
    if raw_eval is not None:
        held_out, method = checked(raw_eval, labels), "data.eval"
    elif raw.held_out is not None:
        held_out = checked(raw.held_out, labels)
        held_out = held_out.select(first(len(held_out.dataset), spec.max_eval_rows, spec.split_seed))
        method = f"{raw.held_out.name}, at most {spec.max_eval_rows} rows"
    else:
        train, held_out = split(train, spec.eval_fraction, spec.max_eval_rows, spec.split_seed)
        method = (
            f"{spec.eval_fraction:g} of the rows, at most {spec.max_eval_rows}, split off with seed {spec.split_seed}"
        )
    retain = None
    if spec.retain is not None:
        retain = checked(read_rows(spec.retain, what="data.retain", skip_bad_rows=spec.skip_bad_rows), labels)
    sources = {"train": train, "eval": held_out, **({"retain": retain} if retain else {})}
    report = {
        "task": task,
        "sources": {use: _source(rows) for use, rows in sources.items()},
        "split": {"method": method, "train": len(train.dataset), "eval": len(held_out.dataset)},
        "duplicates": duplicates(train, held_out),
        "notes": list(dict.fromkeys(note for rows in sources.values() for note in rows.raw.notes)),
    }
    known = head_names(config) if labels is not None else None
    if known is not None and known != labels:
        report["notes"].append(f"the model's head tells {', '.join(known)} apart; these classes need a new one")
    return Gathered(task, train, held_out, retain, labels, report, folder)


def _source(rows: Rows) -> dict[str, Any]:
    return {
        "name": rows.raw.name,
        "shape": rows.meaning.words,
        "rows_read": rows.raw.count + len(rows.raw.problems.rows),
        "bad_rows": rows.problems.summary(),
        "columns": dict(rows.meaning.theirs),
        "ignored_columns": list(rows.meaning.ignored),
    }
