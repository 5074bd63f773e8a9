"""What Tunesmith raises when the input, not the code, is at fault.

The command line prints these without a traceback and exits with status 2. A message names the file, line, field,
tensor or option, says what was expected and what was found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TunesmithError(Exception):
    """Something the user can put right; the message says how."""


class DataError(TunesmithError):
    """A row, column or file of data is not what the task needs."""


class RecipeError(TunesmithError):
    """A recipe asks for something that does not exist, or for parts that cannot be combined."""


class ModelError(TunesmithError):
    """A model folder, tensor or layer is not what the method needs."""


class CheckpointError(TunesmithError):
    """A checkpoint is missing, incomplete or belongs to another run."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'rank'?"`, or an empty string when nothing in `known` is close to `word`."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
