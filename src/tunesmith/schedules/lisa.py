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

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from tunesmith.core.modelmap import blocks, roles
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import generator, subset
from tunesmith.errors import TunesmithError

Weights = Annotated[list[NonNegativeFloat], Field(min_length=1)]


@part(
    paper="arXiv:2403.17919",
    refuses={"fsdp": "the optimizer state of sharded weights cannot be given up block by block"},
)
class LISA(Schedule):
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
        super().__init__()
        self.layers, self.interval, self.seed = layers, interval, seed
        self.freeze_embedding, self.weights = freeze_embedding, weights
        self.members: list[frozenset[str]] = []
        self.always: frozenset[str] = frozenset()

    def on_attach(self) -> None:
        """Find the blocks that hold something that trains.

        Raises:
            TunesmithError: fewer blocks than `layers`, or `weights` that do not fit them.
        """
        assert self.model is not None
        names = {id(p): name for name, p in self.eligible.items()}
        found = [
            frozenset(names[id(p)] for p in block.parameters() if id(p) in names)
            for stack in blocks(self.model).values()
            for block in stack
        ]
        self.members = [block for block in found if block]
        inside = frozenset[str]().union(*found)
        left_out = _embedding(self.model) if self.freeze_embedding else frozenset[str]()
        self.always = frozenset(self.eligible) - inside - left_out
        count = len(self.members)
        if count < self.layers:
            raise TunesmithError(
                f"lisa: layers={self.layers} blocks are to train at a time, but only {count} of the {len(found)} "
                f"blocks of {type(self.model).__name__} hold anything that trains; choose fewer layers"
            )
        if self.weights is not None:
            drawable = sum(w > 0 for w in self.weights)
            if len(self.weights) != count or drawable < self.layers:
                raise TunesmithError(
                    f"lisa: weights must give each of the {count} blocks a number, at least layers={self.layers} of "
                    f"them above zero; found {len(self.weights)} numbers, {drawable} above zero"
                )

    def chosen(self, period: int) -> list[int]:
        """The blocks that train in a period, ascending."""
        if self.weights is None:
            return subset(len(self.members), self.layers, self.seed, "lisa", period)
        g = generator(self.seed, "lisa", period)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return sorted(torch.multinomial(weights, self.layers, generator=g).tolist())

    def active(self, step: int) -> Collection[str]:
        return self.always.union(*(self.members[i] for i in self.chosen(step // self.interval)))


def _embedding(model: nn.Module) -> frozenset[str]:
    """Names of what stands before the first block; a block's own, such as T5's position bias, do no harm here."""
    source = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = {id(p) for p in source.parameters()} if source is not None else set()
    # Some models call their output layer an embedding too (GPT-NeoX: `embed_out`).
    outputs = {id(p) for p in head.parameters()} - tied if head is not None else set()
    kinds = roles(model)
    return frozenset(
        name
        for name, p in model.named_parameters()
        if id(p) not in outputs
        and (kinds[name].kind in ("embedding", "position") or "embed" in name.lower() or "project_in." in name)
    )
