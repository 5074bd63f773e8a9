"""Real text that every machine has: the source and docstrings of its own Python standard library.

A module belongs to one of three splits by a stable hash of its name, so pretraining, fine-tuning and held-out
measurements never share a module. The text depends on the Python version; the split of a module does not.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TextSplit = Literal["pretrain", "train", "heldout"]
INSTRUCTION = "Say in one line what this function does."
_SKIPPED = frozenset(
    (
        *("test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"),
        *("lib2to3", "encodings", "pydoc_data"),  # gone from later Pythons; tables of character codes; one long string
    )
)


def module_split(module: str) -> TextSplit:
    """The split of a dotted module name: 70 % pretrain, 15 % train, 15 % held out."""
    share = int.from_bytes(hashlib.sha256(f"realtext\0{module}".encode()).digest()[:8], "big") % 100
    return "pretrain" if share < 70 else "train" if share < 85 else "heldout"


@cache
def modules(split: TextSplit) -> tuple[tuple[str, Path], ...]:
    """The (module, file) pairs of a split, in alphabetical order of the module.

    Raises:
        DataError: an unknown split, or a Python without its library's source.
    """
    if split not in get_args(TextSplit):
        raise DataError(f"realtext: the split must be one of {get_args(TextSplit)}, found {split!r}.")
    root = Path(sysconfig.get_paths()["stdlib"])
    named = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            named.append((".".join(relative.with_suffix("").parts), path))
    if not named:
        raise DataError(f"realtext: no Python source in {root}; install the standard library's .py files.")
    return tuple(sorted(entry for entry in named if module_split(entry[0]) == split))


def functions(
    split: TextSplit, seed: int = 0, n: int | None = None, max_chars: int = 600
) -> Iterator[tuple[str, str, str]]:
    """(module, function source without its docstring, docstring), in an order that `seed` decides.

    Args:
        split: "pretrain", "train" or "heldout".
        n: how many at most; None for all.
        max_chars: the longest source that is given.

    Raises:
        DataError: fewer than `n` exist.
    """
    found = [
        (module, source, docstring)
        for module, path in modules(split)
        for source, docstring in _documented(path)
        if len(source) <= max_chars
    ]
    if n is not None and n > len(found):
        raise DataError(
            f"realtext: {n} functions of the {split!r} split were asked for, but this Python has {len(found)} of at "
            f"most {max_chars} characters. Ask for fewer, or raise max_chars."
        )
    random.Random(f"functions/{seed}").shuffle(found)
    return iter(found[:n])


@cache
def _documented(path: Path) -> tuple[tuple[str, str], ...]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # a few library files are deliberate templates of broken code
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and len(node.body) > 1:
                node.body = node.body[1:]
                node.decorator_list = []
                found.append((ast.unparse(node), docstring))
    return tuple(found)


def docstring_dataset(n: int, split: TextSplit = "train", seed: int = 0, max_chars: int = 600) -> Dataset:
    """Rows (`prompt`, `completion`): a function and an instruction; the first line of its docstring.

    Raises:
        DataError: fewer than `n` exist.
    """
    from datasets import Dataset

    rows = [
        {"prompt": f"{source}\n{INSTRUCTION}\n", "completion": docstring.strip().splitlines()[0].strip()}
        for _, source, docstring in functions(split, seed, n, max_chars)
    ]
    return Dataset.from_list(rows)


def text_stream(split: TextSplit, seed: int = 0, max_chars: int = 2000) -> Iterator[str]:
    """Whole modules in an order that `seed` decides, cut at line ends into pieces of at most about `max_chars`."""
    order = list(modules(split))
    random.Random(f"text/{seed}").shuffle(order)
    for _, path in order:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError:
            continue
        piece = ""
        for line in lines:
            if piece and len(piece) + len(line) > max_chars:
                yield piece
                piece = ""
            piece += line
        if piece.strip():
            yield piece
