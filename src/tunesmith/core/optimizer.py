"""The optimizer contract: `torch.optim.Optimizer`, and what a Trainer must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from tunesmith.core.trace import Trace

Closure = Callable[[], Tensor]


class Optimizer(torch.optim.Optimizer):
    """An optimizer of ours. Options are keyword-only parameters of `__init__(self, params, *, ...)`.

    State lives in `self.state` as tensors and numbers, so that `state_dict` holds all of it.

    Attributes:
        forward_only: Needs no backward pass: `estimate(closure)` measures the loss as often as the method wants, and
            `step()` applies what it found.
        brisk: Options that fit a tiny model, and under which what happens over steps happens within a few, for tests.
    """

    forward_only: ClassVar[bool] = False
    brisk: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def groups(cls, model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups for a model: what trains, with decay on what is neither bias nor normalisation.

        Override it where a method treats some weights differently; `options` are the method's own.
        """
        return decay_groups(model.named_parameters(), model, weight_decay)

    def estimate(self, closure: Closure) -> Tensor:
        """For a forward-only method: run the closure as often as needed, remember the outcome, return the loss.

        Args:
            closure: Returns the loss of the whole optimizer step's batch, (), over all processes; it must be the same
                function every time. A Trainer calls `estimate` with gradients disabled, and so runs the closure; it
                carries forward-mode tangents (`core/tangents.py`). Called with gradients enabled, it also runs the
                backward pass, as torch's closures do, or leaves that to the caller.
        """
        raise TypeError(f"{type(self).__name__} is not a forward-only optimizer")

    def log(self) -> Trace | None:
        """The run so far, where checkpoints are to hold that and no weights; None where they hold weights."""
        return None


def keep_saved_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """After torch's `load_state_dict`: give every tensor of the state the dtype that it was saved with.

    Torch casts floating state to the dtype of its weight, which would round the float32 moments of bf16 weights.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved, held, strict=True):
        if index in state_dict["state"]:
            optimizer.state[p] = _to(state_dict["state"][index], p.device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], model: nn.Module, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, by the rule of transformers' Trainer."""
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decaying = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr_ratios(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the parameters that a part wants to learn at another rate groups of their own, in place.

    A module says so by `lr_ratios() -> {its parameter: multiple of the run's learning rate}`. To be called before a
    learning-rate schedule is made; calling it again changes nothing.
    """
    ratios = {
        id(module.get_parameter(name)): ratio
        for module in model.modules()
        if hasattr(module, "lr_ratios")
        for name, ratio in module.lr_ratios().items()
    }
    if not ratios:
        return
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        if "lr_ratio" in group:
            groups.append(group)
            continue
        split: dict[float, list[int]] = {}
        for i, p in enumerate(group["params"]):
            split.setdefault(ratios.get(id(p), 1.0), []).append(i)
        for ratio, members in split.items():
            lists = [key for key in ("params", "param_names") if key in group]
            listed: dict[str, Any] = {key: [group[key][i] for i in members] for key in lists}
            own: dict[str, Any] = {"lr": group["lr"] * ratio, "lr_ratio": ratio} if ratio != 1.0 else {}
            groups.append({**group, **listed, **own})
    optimizer.param_groups[:] = [group for group in groups if group["params"]]
