"""The data of a run that names none: a skill to learn, and real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "the embedded data"
TOOLS, TOOLS_HELD_OUT = 1000, 200
DOCSTRINGS, DOCSTRINGS_HELD_OUT = 300, 60
MAX_CHARS = 400


def default_data(seed: int = 0) -> tuple[Dataset, Dataset]:
    """(training rows, evaluation rows) with `prompt`, `completion` and `family`.

    1,000 and 200 rows of `tools`, tool calls with one right answer each, and 300 and 60 rows of `docstrings`, functions
    of Python's own library and the first lines of their docstrings.

    Raises:
        DataError: this Python comes without its library's source.
    """
    return _rows(seed, True), _rows(seed, False)


def _rows(seed: int, train: bool) -> Dataset:
    from datasets import concatenate_datasets

    from tunesmith import world
    from tunesmith.world.realtext import docstring_dataset

    split: world.Split = "train" if train else "heldout"
    calls = world.dataset("tools", TOOLS if train else TOOLS_HELD_OUT, split=split, seed=seed)
    documented = docstring_dataset(DOCSTRINGS if train else DOCSTRINGS_HELD_OUT, split, seed, MAX_CHARS)
    documented = documented.add_column("family", ["docstrings"] * len(documented))
    return concatenate_datasets([calls, documented])
