"""LISA: a few random blocks train at a time, with the embedding, the head and the final norm.

Pan, Liu, Diao, Pi, Zhang, Han and Zhang, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
Model Fine-Tuning", NeurIPS 2024 (Algorithm 1).

    period i = steps iK, ..., (i + 1) K - 1:   gamma of the N blocks, drawn without replacement, train with AdamW

so that optimizer state and gradients are those of gamma blocks, while every block is trained over time. A block that
leaves gives its state up and comes back with none. What stands outside of the blocks always trains.

The paper writes a probability per block, p = gamma / N; the released code draws exactly gamma, as here. The released
code keeps the state of the blocks that leave, and so grows to the state of full fine-tuning; the authors' own runs
started a new optimizer in each period. Here the choice depends on seed and period alone, not on a generator's history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from tunesmith.core.part import part
from tunesmith.core.sampling import BlockSampling
from tunesmith.errors import TunesmithError

Weights = Annotated[list[NonNegativeFloat], Field(min_length=1)]


@part(
    paper="arXiv:2403.17919",
    refuses={"fsdp": "the optimizer state of sharded weights cannot be given up block by block"},
)
class LISA(BlockSampling):
    """Random blocks, drawn anew every `interval` optimizer steps.

    A block is a numbered layer of the model that holds something that trains: whole layers in full fine-tuning, the
    adapters inside them otherwise. Those of an encoder-decoder are drawn from one urn.

    Args:
        layers: gamma, the number of blocks that train at a time.
        interval: K, the number of optimizer steps until the next draw.
        freeze_embedding: Leave out the input embedding with its positions, norm and adapters, and with it a head that
            is tied to it. The backward pass then ends at the lowest block that trains; with the embedding it runs
            through all of them.
        seed: Of the draws.
        weights: One number per block, in the order of execution: blocks are drawn one after the other with these
            probabilities, up to a factor. All alike if not given.
    """

    brisk: ClassVar[Mapping[str, object]] = {"layers": 1, "interval": 2}

    def __init__(
        self,
        *,
        layers: PositiveInt = 2,
        interval: PositiveInt = 20,
        freeze_embedding: bool = False,
        seed: int = 0,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(layers=layers, interval=interval, freeze_embedding=freeze_embedding, seed=seed)
        self.weights = weights

    def weights_of_members(self) -> list[float] | None:
        return self.weights

    def on_attach(self) -> None:
        """Find the blocks that hold something that trains.

        Raises:
            TunesmithError: fewer blocks than `layers`, or `weights` that do not fit them.
        """
        super().on_attach()
        if self.weights is not None:
            drawable, count = sum(w > 0 for w in self.weights), len(self.members)
            if len(self.weights) != count or drawable < self.layers:
                raise TunesmithError(
                    f"lisa: weights must give each of the {count} blocks a number, at least layers={self.layers} of "
                    f"them above zero; found {len(self.weights)} numbers, {drawable} above zero"
                )
