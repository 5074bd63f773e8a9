"""What a source is: a file, a folder saved by `datasets`, a folder of images or of data files, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from tunesmith.errors import DataError, did_you_mean
from tunesmith.inputs.arrow import of_dataset
from tunesmith.inputs.formats import SUFFIXES, read_file, suffix
from tunesmith.inputs.images import class_folders, of_folder, split_folders
from tunesmith.inputs.rows import Entry, Problems, RawRows, first_line

TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def read_rows(
    source: str | Path | Dataset | DatasetDict, *, what: str = "data.train", skip_bad_rows: bool = False
) -> RawRows:
    """Find a source and look through it once; nothing is kept in memory.

    Of a source with splits, `data.train` takes the training rows (the others are in `held_out`), any other field the
    validation or test rows.

    Args:
        source: A file, a folder, a hub id or a data set in memory.
        what: The field of the recipe that names it, for messages.
        skip_bad_rows: Note rows that cannot be read, in `problems`, instead of stopping.

    Raises:
        DataError: there is no such source, it holds nothing that can be read, or it has unreadable rows.
    """
    if isinstance(source, DatasetDict):
        return _splits(source, what, what, skip_bad_rows, None)
    if isinstance(source, Dataset):
        return of_dataset(source, what, what, skip_bad_rows)
    name, path = str(source), Path(source).expanduser()
    if path.is_dir():
        return _folder(path, name, what, skip_bad_rows)
    if path.exists():
        return read_file(path, name, what, skip_bad_rows)
    return _hub(name, path, what, skip_bad_rows)


def _folder(path: Path, name: str, what: str, skip: bool) -> RawRows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{what}: {name} was saved by `datasets` but is not complete: {first_line(error)}"
            ) from None
        if isinstance(loaded, DatasetDict):
            return _splits(loaded, name, what, skip, str(path))
        return of_dataset(loaded, name, what, skip, str(path))
    by_split = split_folders(path, (*TRAIN, *HELD_OUT))
    if any(split in by_split for split in TRAIN):
        found = {split: of_folder(folder, f"{name}/{folder.name}", what, skip) for split, folder in by_split.items()}
        return _choose(found, name, what)
    if class_folders(path):
        return of_folder(path, name, what, skip)
    return _data_files(path, name, what, skip)


def _data_files(path: Path, name: str, what: str, skip: bool) -> RawRows:
    inside = [path, path / "data"]
    files = [f for folder in inside if folder.is_dir() for f in sorted(folder.iterdir()) if f.is_file()]
    files = [f for f in files if suffix(f) and f.name not in _NOT_DATA and not f.name.startswith(".")]
    if not files:
        raise DataError(
            f"{what}: the folder {name} holds nothing that can be read: no data set saved by `datasets`, no folders of "
            f"images per class, and no {', '.join(SUFFIXES)} file. It has: {_listing(path)}."
        )
    groups: dict[str, list[Path]] = {}
    for file in files:
        word = re.split(r"[-_.0-9]", file.name.lower(), maxsplit=1)[0]
        groups.setdefault(word if word in (*TRAIN, *HELD_OUT) else "", []).append(file)
    if not any(split in groups for split in TRAIN):
        groups = {"train": files}
    left = [str(file.relative_to(path)) for file in groups.pop("", [])]
    found = {
        split: _joined([read_file(f, f"{name}/{f.relative_to(path)}", what, skip) for f in members], name)
        for split, members in groups.items()
    }
    chosen = _choose(found, name, what)
    if left:
        chosen.notes.append(f"files in {name} that were not read: {', '.join(left)}")
    return chosen


def _joined(parts: list[RawRows], name: str) -> RawRows:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    columns: dict[str, str] = {}
    problems = Problems(first.problems.skip)
    for part in parts:
        columns = {**part.columns, **columns}
        problems.rows += part.problems.rows

    def read(wanted: Sequence[str]) -> Iterator[Entry]:
        for part in parts:
            yield from part.read([column for column in wanted if column in part.columns])

    count = sum(part.count for part in parts)
    return replace(first, name=name, columns=columns, count=count, problems=problems, read=read)


def _splits(loaded: DatasetDict, name: str, what: str, skip: bool, folder: str | None) -> RawRows:
    found = {
        split: of_dataset(rows, f"{name}/{split}", what, skip, folder) for split, rows in loaded.items() if len(rows)
    }
    return _choose(found, name, what)


def _choose(found: dict[str, RawRows], name: str, what: str) -> RawRows:
    train = next((found[split] for split in TRAIN if split in found), None)
    held_out = next((found[split] for split in HELD_OUT if split in found), None)
    chosen = train if what == "data.train" else held_out or train
    if chosen is None and len(found) == 1:
        return next(iter(found.values()))
    if chosen is None:
        wanted = "train" if what == "data.train" else "validation or test"
        raise DataError(f"{what}: {name} has the splits {', '.join(found) or 'none'}; one called {wanted} is expected.")
    if chosen is train and what == "data.train":
        return replace(chosen, held_out=held_out)
    return chosen


def _hub(name: str, path: Path, what: str, skip: bool) -> RawRows:
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    missing = f"{what}: there is no file or folder {name!r}.{did_you_mean(path.name, near)}"
    if suffix(path) or not _HUB_ID.fullmatch(name):
        raise DataError(missing)
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{missing} As a hub data set it cannot be reached either: {first_line(error).rstrip('.')}. Give a path; a "
            "data set of the hub can be saved with `save_to_disk` where the hub is reached, and its folder given."
        ) from None
    if isinstance(loaded, DatasetDict):
        return _splits(loaded, name, what, skip, None)
    return of_dataset(loaded, name, what, skip)


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "nothing"
