"""Algebra over checkpoints, a tensor at a time: memory is a few times the largest tensor, never the model.

A `Checkpoint` is a transformers model folder (one safetensors file or shards with an index) or a tensor mapping in
memory; reading it opens files lazily. `Computed` is a checkpoint whose tensors are made when asked for: the result of a
merge, or a base with a LoRA added. `write` streams tensors into shards of a bounded size and gives the folder its name
when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.core.files import staged_folder
from tunesmith.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", INDEX)


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, read when asked for.

    Args:
        source: A model folder, one safetensors file, or a mapping.
        name: What error messages and records call it; the path if not given.

    Attributes:
        folder: Where config and tokenizer lie; None for tensors in memory.

    Raises:
        CheckpointError: no safetensors there, a shard that is missing or truncated, an index that names what is not.
    """

    def __init__(self, source: str | Path | Mapping[str, Tensor], name: str | None = None) -> None:
        self.folder: Path | None = None
        self._memory: Mapping[str, Tensor] | None = None
        self._where: dict[str, Path] = {}
        self._known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if isinstance(source, Mapping):
            self._memory = source
            self.name = name or "tensors in memory"
            return
        path = Path(source)
        self.name = name or str(path)
        self.folder = path if path.is_dir() else path.parent
        for file, names in _files(path).items():
            opened = _open(file)
            held = opened.keys()
            missing = sorted(set(names) - set(held)) if names is not None else []
            if missing:
                raise CheckpointError(f"{file} lacks the tensor {missing[0]!r}, which {path / INDEX} says it holds")
            for tensor in held if names is None else names:
                self._where[tensor] = file
                piece = opened.get_slice(tensor)
                self._known[tensor] = tuple(piece.get_shape()), _dtype(piece.get_dtype(), tensor, file)

    def __getitem__(self, name: str) -> Tensor:
        if self._memory is not None:
            return self._memory[name].detach()
        return _open(self._where[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory if self._memory is not None else self._where)

    def __len__(self) -> int:
        return len(self._memory if self._memory is not None else self._where)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor without reading it."""
        if self._memory is not None:
            return tuple(self._memory[name].shape), self._memory[name].dtype
        return self._known[name]

    def wide(self, name: str) -> Tensor:
        """The tensor to calculate with: float32 or wider if it is floating; integers and booleans as they are."""
        value = self[name]
        return value.to(widened(value.dtype)) if value.is_floating_point() else value


class Computed(Checkpoint):
    """A checkpoint whose tensors are computed each time they are asked for; it holds none.

    What is calculated with one (`wide`) is not rounded to the dtype in which it would be stored, so that merges can
    follow one another without loss.

    Args:
        like: Gives names, shapes, dtypes and folder.
        value: `name -> tensor`, float32 or wider where `like` is floating.
        name: What error messages and records call it.
    """

    def __init__(self, like: Checkpoint, value: Callable[[str], Tensor], name: str) -> None:
        self.folder, self.name = like.folder, name
        self._like, self._value = like, value

    def __getitem__(self, name: str) -> Tensor:
        return self._value(name).to(self.describe(name)[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._like.describe(name)

    def wide(self, name: str) -> Tensor:
        return self._value(name)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in: float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _dtype(code: str, tensor: str, file: Path) -> torch.dtype:
    if code not in _DTYPES:
        raise CheckpointError(f"{tensor!r} in {file} is stored as {code}, which is not a dtype of ordinary weights")
    return _DTYPES[code]


def _files(path: Path) -> dict[Path, list[str] | None]:
    if path.is_file():
        return {path: None}
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for name, file in index.items():
            files.setdefault(path / file, []).append(name)
        gone = [file for file in files if not file.exists()]
        if gone:
            raise CheckpointError(f"the shard {gone[0]} is missing, which {path / INDEX} names; copy the whole folder")
        return files
    if (path / SINGLE).exists():
        return {path / SINGLE: None}
    found = ", ".join(sorted(p.name for p in path.glob("*"))[:8]) if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path} is not a model folder with safetensors weights (found: {found or 'nothing'})")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); it is truncated or not a safetensors file") from None


def check_alike(reference: Checkpoint, others: Iterable[Checkpoint]) -> None:
    """Every checkpoint has the reference's names and shapes.

    Raises:
        CheckpointError: names the tensor and the checkpoint.
    """
    names = set(reference)
    for other in others:
        if missing := sorted(names - set(other)):
            raise CheckpointError(
                f"{other.name} lacks the tensor {missing[0]!r} of {reference.name} ({len(missing)} in all)"
            )
        if extra := sorted(set(other) - names):
            raise CheckpointError(f"{other.name} has the tensor {extra[0]!r}, which {reference.name} lacks")
        for name in reference:
            ours, theirs = reference.describe(name)[0], other.describe(name)[0]
            if ours != theirs:
                raise CheckpointError(f"{name!r} has shape {theirs} in {other.name} and {ours} in {reference.name}")


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path | None = None,
    extra: Callable[[Path], None] | None = None,
    shard_bytes: int = 2_000_000_000,
) -> Path:
    """Stream tensors into a model folder, which takes its name when complete.

    Args:
        folder: The folder to make; an existing one is replaced as a whole.
        tensors: Names and tensors, read one at a time.
        like: A model folder whose other files (config, tokenizer) are copied.
        extra: Writes more files into the folder.
        shard_bytes: Size from which a new shard is begun.
    """
    folder = Path(folder)
    with staged_folder(folder) as staging:
        shards: list[dict[str, list[int]]] = []
        pending: dict[str, Tensor] = {}
        storages: set[int] = set()
        total = size = 0

        def flush() -> None:
            nonlocal pending, size
            save_file(pending, staging / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append({name: list(t.shape) for name, t in pending.items()})
            pending, size = {}, 0
            storages.clear()

        for name, tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if pending and size + nbytes > shard_bytes:
                flush()
            tensor = tensor.detach().contiguous()
            # Tied tensors in memory share their storage, which safetensors refuses; on disk each is its own.
            storage = tensor.untyped_storage().data_ptr()
            pending[name] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
            size, total = size + nbytes, total + nbytes
        flush()
        _name_shards(staging, shards, total)
        if like is not None:
            for file in like.iterdir():
                if file.is_file() and not file.name.endswith(_WEIGHTS) and not (staging / file.name).exists():
                    shutil.copy2(file, staging / file.name)
        if extra is not None:
            extra(staging)
    return folder


def _name_shards(staging: Path, shards: list[dict[str, list[int]]], total: int) -> None:
    if len(shards) == 1:
        (staging / "shard-0").rename(staging / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (staging / f"shard-{i}").rename(staging / name)
    index = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (staging / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")


def load_into(model: nn.Module, tensors: Checkpoint) -> nn.Module:
    """Copy a checkpoint into a model, a tensor at a time; the model keeps its dtypes and devices.

    A tied tensor that the checkpoint holds under one of its names is filled by that one.

    Raises:
        CheckpointError: names or shapes differ.
    """
    state = model.state_dict(keep_vars=True)
    filled = {state[name].data_ptr() for name in tensors if name in state}
    for name, tensor in state.items():
        if name not in tensors and tensor.data_ptr() not in filled:
            raise CheckpointError(f"{tensors.name} lacks the tensor {name!r} of the model")
    for name in tensors:
        if name not in state:
            raise CheckpointError(f"{tensors.name} has the tensor {name!r}, which the model lacks")
        if tuple(state[name].shape) != tensors.describe(name)[0]:
            raise CheckpointError(
                f"{name!r} has shape {tensors.describe(name)[0]} in {tensors.name} and {tuple(state[name].shape)} in "
                "the model"
            )
        with torch.no_grad():
            state[name].copy_(tensors[name])
    return model
