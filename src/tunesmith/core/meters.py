"""Exact accounting: bytes and FLOPs counted, not timed.

Rules. State: every tensor reachable from an optimizer's state. Saved: each distinct storage that autograd keeps for
the backward pass, parameters left out. Gradients: the peak of what is live, sampled as each one is made. FLOPs:
matrix products and convolutions, two per multiply-add. On a CPU torch counts fused attention as zero; while counting,
attention runs unfused.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, also inside lists, dicts and helper objects; numbers count 0."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return sum(t.numel() * t.element_size() for t in _tensors(optimizer.state, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    # Parameters are the keys of an optimizer's state, not part of it.
    if isinstance(value, nn.Parameter) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry, seen)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _tensors(entry, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


@dataclass
class Saved:
    """What autograd kept."""

    bytes: int = 0


@contextmanager
def saved_bytes(model: nn.Module | None = None) -> Iterator[Saved]:
    """Count the bytes that the forward pass inside the block keeps for its backward pass.

    Args:
        model: Its parameters and buffers do not count; they are there anyway.
    """
    result = Saved()
    owned = set()
    if model is not None:
        owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and not isinstance(tensor, nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
            # A freed address could be given out again and then be counted once instead of twice.
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield result
        result.bytes = sum(sizes.values())
    held.clear()


@dataclass
class Peak:
    """The largest value seen."""

    bytes: int = 0


@contextmanager
def grad_bytes(model: nn.Module) -> Iterator[Peak]:
    """The peak of live `.grad` bytes during the backward passes inside the block."""
    peak = Peak()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def sample(_: Tensor) -> None:
        live = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
        peak.bytes = max(peak.bytes, live)

    handles = [p.register_post_accumulate_grad_hook(sample) for p in parameters]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in `run()`, attention included on every device."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def trainable(model: nn.Module) -> tuple[int, int]:
    """Numbers that train, and all numbers; a quantised weight counts the numbers that it stands for."""
    counts = [(p.requires_grad, _numel(p)) for p in model.parameters()]
    return sum(n for wanted, n in counts if wanted), sum(n for _, n in counts)


def _numel(p: Tensor) -> int:
    state = getattr(p, "quant_state", None)
    shape = getattr(state, "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else p.numel()


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Peak memory during the block: of the GPU if there is one, else of this process (resident set).

    On Linux the kernel's high-water mark is reset first; elsewhere it is the peak since the process began.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_high_water()
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _high_water()


def _reset_high_water() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _high_water() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
