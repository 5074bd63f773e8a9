"""The configurations that AutoPEFT searches, for a model of any depth and width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.adapters.bottleneck import Block
from tunesmith.recipes.pareto import Code

Module = Literal["serial", "parallel", "prefix"]
MODULES: tuple[Module, ...] = ("serial", "parallel", "prefix")


@dataclass(frozen=True)
class Space:
    """The configurations of one model: a bit per block, then a size code per module.

    Attributes:
        blocks: Of the model.
        modules: That may be used.
    """

    blocks: tuple[Block, ...]
    modules: tuple[Module, ...] = MODULES

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width, width / 2, ... rounded down, 1, and 0 for off."""
        width = max(block.width for block in self.blocks)
        return (*(width >> x for x in range(width.bit_length())), 0)

    @property
    def coordinates(self) -> tuple[int, ...]:
        """How many values each coordinate has."""
        return (2,) * len(self.blocks) + (len(self.sizes),) * len(self.modules)

    @property
    def points(self) -> int:
        """How many valid configurations there are."""
        return (2 ** len(self.blocks) - 1) * (len(self.sizes) ** len(self.modules) - 1)

    def valid(self, code: Code) -> bool:
        """At least one block and one module are on."""
        bits, sizes = code[: len(self.blocks)], code[len(self.blocks) :]
        return any(bits) and any(self.sizes[x] for x in sizes)

    def decode(self, code: Code) -> dict[str, Any]:
        """The options of `bottleneck`."""
        bits = code[: len(self.blocks)]
        sizes: dict[str, int] = dict(zip(self.modules, (self.sizes[x] for x in code[len(bits) :]), strict=True))
        return {**dict.fromkeys(MODULES, 0), **sizes, "layers": [i for i, bit in enumerate(bits) if bit]}

    def count(self, code: Code) -> int:
        """Numbers that train, biases included."""
        made = self.decode(code)
        return sum(self.blocks[i].count(made["serial"], made["parallel"], made["prefix"]) for i in made["layers"])


def words(options: Mapping[str, Any], blocks: int) -> str:
    """A configuration in a few words."""
    on = [f"{name} {options[name]}" for name in MODULES if options[name]]
    layers = options["layers"]
    where = "all blocks" if len(layers) == blocks else f"blocks {', '.join(map(str, layers))}"
    return f"{', '.join(on)} in {where}"
