"""Half fine-tuning: a random half of the matrices trains in each stage, the other half keeps what the model knows.

Hui, Zhang, Wang, Xu, Sun and Wu, "HFT: Half Fine-Tuning for Large Language Models", ACL 2025 (Section 3).

    stage t:   theta <- theta - eta m_t * grad L_t,      m_t constant on each matrix, half of the matrices 1

The half is drawn category by category in every block (`core/halves.py`), and anew in each stage: instruction tuning,
preference tuning, each task of a sequence. Half of the gradients and of the optimizer's state is saved, and the FLOPs
of the weight gradients of what rests; those of the input gradients are not, so that the backward pass is a quarter
shorter, not a half. The embedding, the final norm and the head train unless `outside` says otherwise. No code was
released; what the paper leaves open (fused matrices, experts, other tensors of a block) is ours and stands there too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveInt

from tunesmith.core.halves import Level, Outside, chosen
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.errors import TunesmithError


@part(
    paper="arXiv:2404.18466",
    refuses={"fsdp": "what trains of a sharded weight is settled before the run begins"},
)
class HalfFinetuning(Schedule):
    """Trains a half that is drawn by seed and stage. The merge `half-reset` knows the same half of a checkpoint.

    Args:
        level: Where the half is drawn: in each `category` of a block, by whole blocks (`layer`), or among all matrices
            of the `model`.
        stage: Number of the training stage. Give each stage of a sequence its own: the half is drawn by it, and a run
            starts with an optimizer of its own.
        interval: Draw anew every so many optimizer steps of the run as well; what leaves gives its optimizer state up.
            One half for the whole run if not given.
        outside: Whether the embedding, the final norm and the head train or `freeze`.
        seed: Of the draws.
    """

    brisk: ClassVar[Mapping[str, object]] = {"interval": 2}

    def __init__(
        self,
        *,
        level: Level = "category",
        stage: NonNegativeInt = 0,
        interval: PositiveInt | None = None,
        outside: Outside = "train",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.level, self.stage, self.interval = level, stage, interval
        self.outside, self.seed = outside, seed
        self.names: list[str] = []
        self._last: tuple[int, frozenset[str]] = -1, frozenset()

    def on_attach(self) -> None:
        """Take the names of all parameters, also of those that do not train: adapters stand where their layers do.

        Raises:
            ModelError: the model has no numbered blocks.
        """
        assert self.model is not None
        self.names = [name for name, _ in self.model.named_parameters()]
        self._last = -1, self.half()  # names without blocks are refused here

    def half(self, draw: int = 0) -> frozenset[str]:
        """Names of all parameters in the half of a draw."""
        return chosen(self.names, level=self.level, outside=self.outside, seed=self.seed, stage=self.stage, draw=draw)

    def active(self, step: int) -> Collection[str]:
        draw = 0 if self.interval is None else step // self.interval
        if self._last[0] != draw:
            self._last = draw, self.half(draw) & self.eligible.keys()
        if not self._last[1]:
            raise TunesmithError(
                f"half-finetuning: none of the {len(self.eligible)} parameters that train is in the half of seed "
                f"{self.seed}, stage {self.stage}, draw {draw}; let more train, or take another seed"
            )
        return self._last[1]
