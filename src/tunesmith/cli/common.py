"""What several commands share: parsing of values, quiet libraries."""

from __future__ import annotations

from typing import Any

import yaml

from tunesmith.errors import RecipeError


def texts(given: list[str] | None, what: str, example: str) -> dict[str, str]:
    """`["a=b"]` as `{"a": "b"}`; the values as they were typed.

    Raises:
        RecipeError: one is not `name=value`, or a name was given twice.
    """
    found: dict[str, str] = {}
    for text in given or []:
        name, value = _split(text, what, example)
        if name in found:
            raise RecipeError(f"{what} {text}: {name} was given before, as {found[name]}; give it once")
        found[name] = value
    return found


def assignments(given: list[str] | None) -> dict[str, Any]:
    """`["a.b=1", "c=[x, y]"]` as `{"a.b": 1, "c": ["x", "y"]}`; values are YAML, and the last of a name counts.

    Raises:
        RecipeError: one is not `name=value`.
    """
    found: dict[str, Any] = {}
    for text in given or []:
        name, value = _split(text, "--set", "train.steps=200")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
        # YAML 1.1 reads 1e-4 as text; nobody means that on a command line.
        if isinstance(found[name], str):
            found[name] = _number(found[name])
    return found


def _split(text: str, what: str, example: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise RecipeError(f"{what} {text}: expected NAME=VALUE, such as {what} {example}")
    return name, value


def _number(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() and text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def quiet() -> None:
    """Keep progress bars and advice of the libraries below off the terminal; errors still come through."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|trl|bitsandbytes)")
