"""A model divided from bottom to top: blocks, their attention and MLP, linear layers; and what is at the top."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tunesmith.core.modelmap import Role, roles
from tunesmith.errors import ModelError

Unit = Literal["model", "block", "module", "linear"]
_ATTENTION = ("q", "k", "v", "qkv", "o")
_ADDED = re.compile(r"\.(?:lora_|tunesmith_)")
"""Where the name of a layer ends and that of an adapter's parameter in it begins."""


@dataclass(frozen=True)
class Standing:
    """Where a parameter stands.

    Attributes:
        unit: The unit that it belongs to.
        top: Whether it is in one of the topmost blocks, or above them.
    """

    unit: str
    top: bool


def standings(model: nn.Module, unit: Unit, top: int = 0) -> dict[str, Standing]:
    """Of every parameter; units in the order in which the model names them, which is the forward pass's.

    What is outside of the blocks is one unit `below` them and one `above`. Embeddings are below, also one that is tied
    to the head.

    Args:
        model: With numbered blocks, unless neither `unit` nor `top` asks for them.
        unit: The whole `model`, a `block`, the attention and the MLP of a block (`module`; a norm goes with the one
            that it is named after, else with the MLP), or a `linear` layer, norms by block.
        top: Blocks of the last stack (a decoder's, if there are two) that are the top; fewer than it has.

    Raises:
        ModelError: there are no blocks, or too few.
    """
    known = roles(model)
    if unit == "model" and not top:
        return {name: Standing("model", False) for name in known}
    inside = [name for name, role in known.items() if role.depth]
    if not inside:
        raise ModelError(
            f"{type(model).__name__} has no numbered blocks (such as `model.layers.0`), by which unit={unit!r} and "
            f"first_order={top} divide a model"
        )
    last = known[inside[-1]].depth
    assert last is not None
    if top >= last.count:
        raise ModelError(f"first_order={top}: the topmost stack, {last.stack!r}, has {last.count} blocks; take fewer")
    behind = list(known).index(inside[-1])
    found = {}
    for place, (name, role) in enumerate(known.items()):
        above = role.depth is None and place > behind and role.kind not in ("embedding", "position")
        high = role.depth is not None and role.depth.stack == last.stack and role.depth.index >= last.count - top
        found[name] = Standing(_unit(name, role, unit, above), top > 0 and (above or high))
    return found


def _unit(name: str, role: Role, unit: Unit, above: bool) -> str:
    if unit == "model":
        return "model"
    if unit == "linear" and role.kind not in ("norm", "embedding", "position"):
        layer, *added = _ADDED.split(name, maxsplit=1)
        return layer if added else layer.rpartition(".")[0]
    if role.depth is None:
        return "above" if above else "below"
    block = f"{role.depth.stack}.{role.depth.index}"
    if unit != "module":
        return block
    attends = role.kind in _ATTENTION or "attn" in name or "attention" in name
    return f"{block}.{'attention' if attends else 'mlp'}"
