"""Half-reset: a random half of a tuned model goes back to the base model.

Hui, Zhang, Wang, Xu, Sun and Wu, "HFT: Half Fine-Tuning for Large Language Models", ACL 2025 (the pilot experiment on
Llama 2 Chat from which half fine-tuning follows).

    theta = m * theta_tuned + (1 - m) * theta_base,      m constant on each matrix, half of the matrices 1

with the half of the schedule `half-finetuning` for the same level, seed and stage (`core/halves.py`): a model that was
tuned by halves in one stage is left as it is. Nothing is trained; memory is that of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import NonNegativeInt

from tunesmith.core.halves import Level, Outside, chosen
from tunesmith.core.merging import Judges, LinearMerge, parameters
from tunesmith.core.part import part
from tunesmith.core.statedict import Checkpoint


@part(paper="arXiv:2404.18466")
class HalfReset(LinearMerge):
    """Keeps half of what one tuned model changed.

    Args:
        level: Where the half is drawn: in each `category` of a block, by whole blocks (`layer`), or among all matrices
            of the `model`.
        stage: Number of the training stage, as in `half-finetuning`.
        outside: Whether the embedding, the final norm and the head are kept as they were tuned (`train`), or go back
            (`freeze`).
        seed: Of the draws.
    """

    needs_base = True
    takes_one = True

    def __init__(
        self, *, level: Level = "category", stage: NonNegativeInt = 0, outside: Outside = "train", seed: int = 0
    ) -> None:
        self.level, self.stage, self.outside, self.seed = level, stage, outside, seed
        self.kept: frozenset[str] = frozenset()
        self._record: dict[str, object] = {}

    def prepare(self, base: Checkpoint | None, models: Sequence[Checkpoint], judges: Judges) -> None:
        assert base is not None
        self.kept = chosen(base, level=self.level, outside=self.outside, seed=self.seed, stage=self.stage)
        sizes = {name: math.prod(base.describe(name)[0]) for name in parameters(base)}
        left = sum(size for name, size in sizes.items() if name in self.kept)
        self._record = {
            "level": self.level,
            "seed": self.seed,
            "stage": self.stage,
            "outside": self.outside,
            "tensors kept": sum(name in self.kept for name in sizes),
            "tensors reset": sum(name not in self.kept for name in sizes),
            "share of the numbers kept": left / sum(sizes.values()),
        }

    def coefficients(self, name: str, count: int) -> Sequence[float]:
        return [float(name in self.kept)]

    def record(self) -> dict[str, object]:
        """The options, how many tensors were kept and reset, and the share of the numbers that was kept."""
        return self._record
