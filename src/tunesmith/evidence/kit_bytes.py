"""Counting the bytes of the tensors that a block of code makes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The peak of what operations inside the block have made and what is still alive; inputs do not count.

    A storage counts once, whole, from the operation that made it until it is freed; what an operation needs while it
    runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in given and storage._cdata not in self._made:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self._made.pop(key)

        self._made[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
