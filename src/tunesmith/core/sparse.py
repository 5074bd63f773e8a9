"""Changes of few entries: one type and one file for every method that makes such.

A `SparseDelta` holds, for some tensors of a model, which entries differ from the base and by how much; and whole
tensors that the base does not have, such as a new head. Deltas of one base form a vector space: they are added,
subtracted, scaled and intersected; applied, they give the tuned model up to the rounding of one addition.

What a delta is relative to is written into it: a digest of 64 entries of each tensor that it changes, in bfloat16, so
that the dtype in which the base was loaded makes no difference. Another base is refused. So is a base to which a delta
of the same tensors was applied before: add the deltas, then apply the sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.core.entries import Entries, add_entries_, digest, largest
from tunesmith.core.files import staged_file
from tunesmith.core.statedict import Checkpoint, Computed
from tunesmith.errors import CheckpointError

FORMAT = "tunesmith.sparse-delta/1"


@dataclass(frozen=True)
class SparseDelta(Mapping[str, Entries]):
    """Entries by the name of the tensor that they change.

    Attributes:
        entries: By the names of the base's state dict; tied tensors once.
        base: Digest of each tensor of `entries` in the base.
        whole: Tensors that take the place of the base's, or that it lacks.
        about: What made it, for whoever reads the file.
    """

    entries: Mapping[str, Entries]
    base: Mapping[str, int]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entries:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def count(self) -> int:
        """Entries in all."""
        return sum(len(entries) for entries in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of indices, values and whole tensors: the file without its header."""
        held = [t for entries in self.values() for t in (entries.indices, entries.values)]
        return sum(t.numel() * t.element_size() for t in [*held, *self.whole.values()])

    def norm(self) -> float:
        """Euclidean length of all entries."""
        squares = [entries.values.double().square().sum() for entries in self.values()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    # Made from two models -----------------------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        *,
        keep: int | float | None = None,
        above: float = 0.0,
        about: Mapping[str, Any] | None = None,
    ) -> SparseDelta:
        """What differs, a tensor at a time.

        Args:
            base: What was tuned.
            tuned: Its floating tensors that the base has in another shape or not at all are kept whole.
            keep: Only the so many largest differences of all tensors together, a number or a share below 1 of the
                entries; of equal ones the first, by name and place. All of them if None.
            above: Only differences whose size is above this.
            about: As the attribute.

        Raises:
            CheckpointError: the tuned model lacks a tensor of the base, or a difference is not finite.
        """
        missing = sorted(set(base) - set(tuned))
        if missing:
            raise CheckpointError(f"{tuned.name} lacks the tensor {missing[0]!r} of {base.name}")
        floating = [name for name in sorted(tuned) if tuned.describe(name)[1].is_floating_point]
        shared = [n for n in floating if n in base and base.describe(n)[0] == tuned.describe(n)[0]]
        shared = _once(tuned, shared)
        total = sum(torch.Size(base.describe(name)[0]).numel() for name in shared)
        budget = total if keep is None else round(keep * total) if isinstance(keep, float) else keep
        if not 0 < budget <= total:
            raise CheckpointError(f"keep={keep} of {total} entries is {budget} of them; expected 1 to {total}")

        def sizes(name: str) -> Tensor:
            size = (tuned.wide(name) - base.wide(name)).abs()
            if not bool(size.isfinite().all()):
                raise CheckpointError(f"{name!r} differs by a value that is not finite")
            return torch.where(size > above, size, 0)

        chosen = largest(((name, sizes(name)) for name in shared), budget)
        entries = {name: Entries.of(tuned.wide(name) - base.wide(name), places) for name, places in chosen.items()}
        digests = {name: digest(base[name]) for name in entries}
        new = [n for n in floating if n not in base or base.describe(n)[0] != tuned.describe(n)[0]]
        return cls(entries, digests, {n: tuned[n] for n in new}, about or {})

    # Algebra ------------------------------------------------------------------------------------------------------

    def __add__(self, other: SparseDelta) -> SparseDelta:
        """Both changes together; where both have an entry, their sum.

        Raises:
            CheckpointError: they are relative to different bases, or hold different whole tensors of one name.
        """
        for name in self.whole.keys() & other.whole.keys():
            if not torch.equal(self.whole[name], other.whole[name]):
                raise CheckpointError(f"both deltas hold a whole {name!r}, and not the same one; drop it from one")
        entries = dict(self.entries)
        for name, theirs in other.items():
            if name not in self:
                entries[name] = theirs
                continue
            ours = self._alike(other, name)
            both = torch.cat([ours.indices, theirs.indices]).unique()
            wide = torch.promote_types(ours.values.dtype, theirs.values.dtype)
            values = torch.zeros(len(both), dtype=wide)
            for one in (ours, theirs):
                values.index_add_(0, torch.searchsorted(both, one.indices), one.values.to(wide))
            entries[name] = Entries(ours.shape, both, values)
        return SparseDelta(entries, {**self.base, **other.base}, {**self.whole, **other.whole}, dict(self.about))

    def __mul__(self, factor: float) -> SparseDelta:
        """The change `factor` times as large; whole tensors stay."""
        scaled = {n: Entries(e.shape, e.indices, e.values * factor) for n, e in self.items()}
        return SparseDelta(scaled, self.base, self.whole, self.about)

    __rmul__ = __mul__

    def __neg__(self) -> SparseDelta:
        return self * -1.0

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        return self + SparseDelta((-other).entries, other.base)

    def at(self, other: SparseDelta) -> SparseDelta:
        """Only the entries whose places the other delta has too (the intersection, with this one's values).

        Raises:
            CheckpointError: they are relative to different bases.
        """
        found = {}
        for name in self:
            if name in other:
                ours = self._alike(other, name)
                inside = torch.isin(ours.indices, other[name].indices)
                if bool(inside.any()):
                    found[name] = Entries(ours.shape, ours.indices[inside], ours.values[inside])
        return SparseDelta(found, {name: self.base[name] for name in found}, {}, self.about)

    def overlap(self, other: SparseDelta) -> float:
        """The share of the other's entries that this one has too, 0 to 1."""
        return self.at(other).count / max(other.count, 1)

    def to(self, dtype: torch.dtype) -> SparseDelta:
        """The values in another floating dtype, half precision for a smaller file."""
        cast = {n: Entries(e.shape, e.indices, e.values.to(dtype)) for n, e in self.items()}
        return SparseDelta(cast, self.base, self.whole, self.about)

    def _alike(self, other: SparseDelta, name: str) -> Entries:
        if self[name].shape != other[name].shape or self.base[name] != other.base[name]:
            raise CheckpointError(f"the two deltas are relative to different bases: {name!r} was not the same tensor")
        return self[name]

    # On models ----------------------------------------------------------------------------------------------------

    def check(self, base: Mapping[str, Tensor], what: str) -> None:
        """Refuse a base that this is not relative to.

        Raises:
            CheckpointError: names the tensor that is missing or different.
        """
        for name, entries in self.items():
            if name not in base:
                raise CheckpointError(f"{what} lacks the tensor {name!r}, which the delta changes: it is another base")
            shape = base.describe(name)[0] if isinstance(base, Checkpoint) else tuple(base[name].shape)
            if shape != entries.shape:
                raise CheckpointError(f"{name!r} has shape {shape} in {what}; the delta is for {entries.shape}")
            if digest(base[name]) != self.base[name]:
                raise CheckpointError(
                    f"{what} is not the base of this delta: {name!r} holds other numbers. Give the model that was "
                    "tuned; deltas of one base are added to one another first, then applied"
                )

    def on(self, base: Checkpoint, scale: float = 1.0) -> Computed:
        """The tuned checkpoint, a tensor at a time; write it with `statedict.write`.

        Raises:
            CheckpointError: as `check`.
        """
        self.check(base, base.name)

        def value(name: str) -> Tensor:
            if name in self.whole:
                return self.whole[name]
            wide = base.wide(name)
            return self[name].added_to(wide, scale) if name in self else wide

        return _Extended(base, value, f"{base.name} with a delta", self.whole)

    @contextmanager
    def applied(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model with the change inside the block; afterwards every bit is as it was.

        Raises:
            CheckpointError: as `check`; or the model lacks a whole tensor.
        """
        state = self._fitting(model)
        kept = {name: state[name].view(-1)[e.indices.long().to(state[name].device)] for name, e in self.items()}
        replaced = {name: state[name].clone() for name in self.whole}
        self.add_(model, scale)
        try:
            yield model
        finally:
            for name, values in kept.items():
                state[name].view(-1)[self[name].indices.long().to(values.device)] = values
            for name, value in replaced.items():
                state[name].copy_(value)

    def add_(self, model: nn.Module, scale: float = 1.0) -> nn.Module:
        """Apply to a model in place; whole tensors take the place of the model's.

        Raises:
            CheckpointError: as `check`; or the model lacks a whole tensor, or has it in another shape.
        """
        state = self._fitting(model)
        for name, entries in self.items():
            add_entries_(state[name], entries, scale)
        for name, value in self.whole.items():
            state[name].copy_(value)
        return model

    def remove_(self, model: nn.Module) -> nn.Module:
        """Take the change away from a model that it was applied to; whole tensors stay. Exact up to rounding.

        Raises:
            CheckpointError: what is left is not the base; the model is as it was before.
        """
        state = self._state(model)
        for name, entries in self.items():
            if name in state and tuple(state[name].shape) == entries.shape:
                add_entries_(state[name], entries, -1.0)
        try:
            self.check(state, f"{type(model).__name__} without the delta")
        except CheckpointError:
            for name, entries in self.items():
                if name in state and tuple(state[name].shape) == entries.shape:
                    add_entries_(state[name], entries, 1.0)
            raise
        return model

    def _fitting(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors, checked to be those that this changes."""
        state = self._state(model)
        self.check(state, type(model).__name__)
        for name, value in self.whole.items():
            if name not in state or state[name].shape != value.shape:
                found = tuple(state[name].shape) if name in state else "no such tensor"
                raise CheckpointError(
                    f"the delta brings a whole {name!r} of shape {tuple(value.shape)}; {type(model).__name__} has "
                    f"{found}. Load the model for the task that it was tuned for"
                )
        return state

    @staticmethod
    def _state(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}

    # Files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: 8 bytes per float32 entry."""
        tensors = {f"whole/{name}": value.detach().cpu().contiguous() for name, value in self.whole.items()}
        for name, entries in self.items():
            tensors[f"indices/{name}"] = entries.indices.cpu().contiguous()
            tensors[f"values/{name}"] = entries.values.detach().cpu().contiguous()
        meta = {
            "format": FORMAT,
            "shapes": json.dumps({name: list(entries.shape) for name, entries in self.items()}),
            "base": json.dumps(dict(self.base)),
            "about": json.dumps(dict(self.about)),
        }
        with staged_file(path) as staging:
            save_file(tensors, staging, meta)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SparseDelta:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, truncated, or no such delta.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise CheckpointError(f"{path}: expected a {FORMAT} file, found the format {meta.get('format')!r}")
                shapes, base = json.loads(meta["shapes"]), json.loads(meta["base"])
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected a {FORMAT} file; it cannot be read ({error})") from error
        entries = {}
        for name, shape in shapes.items():
            try:
                entries[name] = Entries(tuple(shape), held[f"indices/{name}"], held[f"values/{name}"])
            except (KeyError, CheckpointError) as error:
                raise CheckpointError(f"{path}: {name!r}: {error}") from None
        whole = {key.removeprefix("whole/"): value for key, value in held.items() if key.startswith("whole/")}
        return cls(entries, base, whole, json.loads(meta["about"]))


def _once(tensors: Checkpoint, names: list[str]) -> list[str]:
    """The names without further ones of a tied tensor, which a state dict in memory lists under each of its names."""
    if tensors.folder is not None or isinstance(tensors, Computed):
        return names
    first: dict[tuple[int, int], str] = {}
    for name in names:
        held = tensors[name]
        first.setdefault((held.data_ptr(), held.numel()) if held.numel() else (0, len(first)), name)
    return list(first.values())


class _Extended(Computed):
    """A computed checkpoint with tensors that its model lacks, or has in another shape."""

    def __init__(
        self, like: Checkpoint, value: Callable[[str], Tensor], name: str, whole: Mapping[str, Tensor]
    ) -> None:
        super().__init__(like, value, name)
        self._whole = whole

    def __iter__(self) -> Iterator[str]:
        yield from self._like
        yield from (name for name in self._whole if name not in self._like)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name in self._whole:
            return tuple(self._whole[name].shape), self._whole[name].dtype
        return super().describe(name)
