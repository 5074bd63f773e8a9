"""Pictures: folders of them by class, checking that each can be opened, and opening them for a batch."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.inputs.rows import Entry, Problems, RawRows, RowError, first_line, kind

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)
"""What Pillow raises on a file that is no picture, or half of one."""


@cache
def pillow() -> Any:
    """PIL, with its modules for opening and turning.

    Raises:
        DataError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise DataError("Rows with images need Pillow: `pip install 'tunesmith[vision]'`.") from None
    return PIL


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class -> its pictures, at any depth, for each folder right below `folder` that has some, in order."""
    found = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            pictures = sorted(p for p in child.rglob("*") if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
            if pictures:
                found[child.name] = pictures
    return found


def split_folders(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Split -> folder, for the folders below that have a split's name and hold folders of pictures."""
    children = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return {name: children[name] for name in names if name in children and class_folders(children[name])}


def of_folder(folder: Path, name: str, what: str, skip: bool) -> RawRows:
    """Rows (`image`, `label`) of a folder with one folder of pictures per class."""
    classes = class_folders(folder)
    count = sum(map(len, classes.values()))

    def read(columns: Sequence[str]) -> Iterator[Entry]:
        for label, pictures in classes.items():
            for picture in pictures:
                yield f"{name}/{picture.relative_to(folder)}", {"image": str(picture.resolve()), "label": label}

    columns = {"image": "text", "label": "text"}
    loose = sum(1 for entry in folder.iterdir() if entry.suffix.lower() in ENDINGS)
    notes = [f"{loose} images lie beside the class folders of {name} and were not read"] if loose else []
    return RawRows(name, what, columns, count, Problems(skip), read, notes=notes)


def check(value: Any, field: str, folder: str | None) -> tuple[dict[str, Any], bytes]:
    """(what is stored: bytes or absolute path; the picture's file content), once it is known to open.

    Raises:
        RowError: no picture, a file that is not there, or one that cannot be read.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
    if content is None:
        if not isinstance(path, str):
            found = kind(value) if path is value else "an object without `bytes` or `path`"
            raise RowError("type", f"field {field!r}: expected the path of an image, found {found}")
        if not path.strip():
            raise RowError("empty", f"field {field!r}: expected the path of an image, found an empty text")
        place = Path(folder or ".", Path(path).expanduser()).resolve()
        if not place.is_file():
            raise RowError("image", f"field {field!r}: there is no image {path!r}; paths are relative to the file")
        try:
            content = place.read_bytes()
        except OSError as error:
            raise RowError("image", f"field {field!r}: {path!r} cannot be read: {error.strerror}") from None
        stored: dict[str, Any] = {"bytes": None, "path": str(place)}
    else:
        stored = {"bytes": content, "path": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow().Image.open(BytesIO(content)) as picture:
                picture.verify()
    except (*_DAMAGED, pillow().Image.DecompressionBombError) as error:
        named = f" {path!r}" if path else ""
        reason = first_line(error).split(" <_io")[0]
        raise RowError("image", f"field {field!r}: the image{named} cannot be read: {reason}") from None
    return stored, content


def opened(stored: Mapping[str, Any], mode: str) -> Any:
    """The PIL picture, upright, in `mode` ("RGB" or "L").

    Raises:
        DataError: the file has gone or is damaged.
    """
    place = stored.get("path") or "an image given as bytes"
    try:
        source = BytesIO(stored["bytes"]) if stored.get("bytes") is not None else stored["path"]
        with pillow().Image.open(source) as picture:
            return pillow().ImageOps.exif_transpose(picture).convert(mode)
    except _DAMAGED as error:
        raise DataError(f"{place} cannot be read: {first_line(error)}") from None
