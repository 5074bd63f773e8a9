"""Class names: which number each one gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tunesmith.errors import DataError


def class_names(found: Iterable[str], declared: Sequence[str] | None, config: Any, name: str) -> list[str]:
    """The names of the classes, in the order of their numbers.

    The head of a model that has been trained on these classes keeps its order; then comes that of the source, if it
    declares one; otherwise whole numbers are sorted as numbers and names as text.

    Args:
        found: Labels of the rows, numbers as text.
        declared: Names that the source declares.
        config: The model's.
        name: Of the source, for messages.

    Raises:
        DataError: fewer than two classes.
    """
    labels = set(found)
    if len(labels) < 2:
        raise DataError(
            f"{name}: every row has the label {next(iter(labels), None)!r}; a classification needs two classes or more."
        )
    known = head_names(config)
    if known is not None and labels <= (set(known) if declared is not None else accepted(known)):
        return known
    if declared is not None and labels <= set(declared):
        return list(declared)
    return sorted(labels, key=int) if all(map(_whole, labels)) else sorted(labels)


def head_names(config: Any) -> list[str] | None:
    """The classes that the model's head was trained on; None if it has only numbers in their place."""
    names = getattr(config, "id2label", None) or {}
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    return None if len(ordered) < 2 or all(n == f"LABEL_{i}" for i, n in enumerate(ordered)) else ordered


def accepted(names: Sequence[str]) -> set[str]:
    """Labels that stand for one of the classes: their names, or their numbers where no name is a number."""
    return set(names) | (set() if any(map(_whole, names)) else set(map(str, range(len(names)))))


def numbers(names: Sequence[str], found: Iterable[str]) -> dict[str, int]:
    """Label -> class, for labels that are `accepted`."""
    by_name = {name: at for at, name in enumerate(names)}
    return {label: by_name[label] if label in by_name else int(label) for label in found}


def _whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
