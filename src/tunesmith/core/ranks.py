"""Which layer gets how much rank: a table that any low-rank adapter takes, and the ways to fill it from scores.

    table = RankTable.load("ranks.json")
    tunesmith.adapter("dylora", ranks=table)

A layer of rank 0 is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.files import write_text
from tunesmith.core.modelmap import roles_from_names
from tunesmith.errors import RecipeError


class RankTable(Mapping[str, int]):
    """Ranks by layer name, in the order of the model.

    Args:
        ranks: 0 or more for each layer.
        scores: What they were chosen by, one number per layer; optional.
        source: How they were found, in words.

    Raises:
        RecipeError: a rank that is no whole number of at least 0, or no layer at all.
    """

    def __init__(
        self, ranks: Mapping[str, int], scores: Mapping[str, float] | None = None, source: str = "given"
    ) -> None:
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise RecipeError(f"the rank of {name!r} must be a whole number of at least 0, found {rank!r}")
        if not any(ranks.values()):
            raise RecipeError("a rank table needs at least one layer of rank 1 or more")
        self.ranks, self.scores, self.source = dict(ranks), dict(scores or {}), source

    def __getitem__(self, name: str) -> int:
        return self.ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, int] | RankTable) -> RankTable:
        """A table from a file that `save` wrote, or from a mapping.

        Raises:
            RecipeError: names the file and what is wrong with it.
        """
        if isinstance(source, RankTable):
            return source
        if isinstance(source, Mapping):
            return cls(source)
        path = Path(source)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"there is no rank table {path}; `tunesmith ranks` writes one") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} is not a rank table: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("ranks"), dict):
            raise RecipeError(f'{path} is not a rank table: expected {{"ranks": {{"layer": rank, ...}}}}')
        try:
            return cls(content["ranks"], content.get("scores"), content.get("source", str(path)))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads."""
        content: dict[str, Any] = {"source": self.source, "ranks": self.ranks}
        if self.scores:
            content["scores"] = self.scores
        write_text(path, json.dumps(content, indent=1) + "\n")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) of a table with a block per row and a kind of layer per column; layers outside come last."""
        place = {name: roles_from_names([f"{n}.weight" for n in self])[f"{name}.weight"] for name in self}
        kinds: list[str] = []
        blocks: dict[str, dict[str, str]] = {}
        outside: list[list[str]] = []
        for name, rank in self.items():
            role = place[name]
            if role.depth is None:
                outside.append([name, str(rank)])
                continue
            kind = role.kind if role.kind != "other" else name.rpartition(".")[2]
            if kind not in kinds:
                kinds.append(kind)
            cell = blocks.setdefault(f"{role.depth.stack}.{role.depth.index}", {})
            cell[kind] = f"{cell[kind]}, {rank}" if kind in cell else str(rank)
        lines = [[block, *(cells.get(kind, "") for kind in kinds)] for block, cells in blocks.items()]
        width = len(kinds) + 1
        lines += [[*row, *[""] * (width - len(row))][: max(width, 2)] for row in outside]
        return ["block", *kinds] if kinds else ["layer", "rank"], lines


def largest(scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest scores over all layers each layer holds; ties go to the earlier layer.

    Args:
        scores: (n,) per layer, a score for each component that it could have.
        budget: Components in all; at most as many as there are scores.
    """
    flat = torch.cat([values.float().flatten().cpu() for values in scores.values()])
    owner = torch.cat([torch.full((values.numel(),), i) for i, values in enumerate(scores.values())])
    order = torch.sort(flat, descending=True, stable=True).indices[:budget]
    counts = torch.bincount(owner[order], minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))


def proportional(
    weights: Mapping[str, float], costs: Mapping[str, int], limits: Mapping[str, int], budget: int, least: int = 1
) -> dict[str, int]:
    """Ranks in proportion to weights, scaled so that what they cost comes as near below the budget as rounding allows.

    Args:
        weights: Of each layer, not negative.
        costs: Parameters of one rank of each layer.
        limits: The largest rank of each layer.
        budget: Parameters in all.
        least: The smallest rank of a layer.

    Raises:
        RecipeError: the budget does not pay for the smallest ranks, or the weights are not finite and positive.
    """
    if not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise RecipeError("ranks in proportion to scores need scores that are finite, not negative and not all zero")

    def at(scale: float) -> dict[str, int]:
        return {n: max(least, min(limits[n], int(scale * w + 0.5))) for n, w in weights.items()}

    def paid(ranks: Mapping[str, int]) -> int:
        return sum(costs[name] * rank for name, rank in ranks.items())

    if paid(at(0.0)) > budget:
        raise RecipeError(f"rank {least} in every layer costs {paid(at(0.0)):,} parameters; the budget is {budget:,}")
    low, high = 0.0, max(limits.values()) / min(w for w in weights.values() if w > 0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if paid(at(middle)) <= budget else (low, middle)
    return at(low)
