"""Blocks that take turns in training: what schedules share that draw some anew every so many steps.

A block is a numbered layer of the model that holds something that trains: whole layers in full fine-tuning, the
adapters inside them otherwise. Those of an encoder-decoder are drawn from one urn. What stands outside of the blocks
trains always.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from tunesmith.core.modelmap import blocks, roles
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import generator, subset
from tunesmith.errors import TunesmithError


class BlockSampling(Schedule):
    """Random blocks, drawn anew every `interval` optimizer steps.

    Args:
        layers: Blocks that train at a time.
        interval: Optimizer steps until the next draw.
        freeze_embedding: Leave out what stands before the blocks, and with it a head that is tied to it.
        seed: Of the draws.

    Attributes:
        members: Names of what trains in each block that holds any, in the order of execution.
        places: Of each member, its number among all blocks.
        always: Names of what trains in every step.
    """

    def __init__(self, *, layers: int, interval: int, freeze_embedding: bool, seed: int) -> None:
        super().__init__()
        self.layers, self.interval, self.seed = layers, interval, seed
        self.freeze_embedding = freeze_embedding
        self.members: list[frozenset[str]] = []
        self.places: list[int] = []
        self.always: frozenset[str] = frozenset()
        self.slug = type(self).__module__.rpartition(".")[2].replace("_", "-")

    def weights_of_members(self) -> Sequence[float] | None:
        """One number per member, up to a factor its chance in a draw; None: all alike."""
        return None

    def on_attach(self) -> None:
        """Find the blocks that hold something that trains.

        Raises:
            TunesmithError: fewer blocks than `layers`.
        """
        assert self.model is not None
        names = {id(p): name for name, p in self.eligible.items()}
        found = [
            frozenset(names[id(p)] for p in block.parameters() if id(p) in names)
            for stack in blocks(self.model).values()
            for block in stack
        ]
        self.members = [block for block in found if block]
        self.places = [i for i, block in enumerate(found) if block]
        inside = frozenset[str]().union(*found)
        left_out = embedding(self.model) if self.freeze_embedding else frozenset[str]()
        self.always = frozenset(self.eligible) - inside - left_out
        count = len(self.members)
        if count < self.layers:
            raise TunesmithError(
                f"{self.slug}: layers={self.layers} blocks are to train at a time, but only {count} of the "
                f"{len(found)} blocks of {type(self.model).__name__} hold anything that trains; choose fewer layers"
            )

    def chosen(self, period: int) -> list[int]:
        """The blocks that train in a period, ascending."""
        weights = self.weights_of_members()
        if weights is None:
            return subset(len(self.members), self.layers, self.seed, self.slug, period)
        g = generator(self.seed, self.slug, period)
        return sorted(torch.multinomial(torch.tensor(weights, dtype=torch.float64), self.layers, generator=g).tolist())

    def active(self, step: int) -> Collection[str]:
        return self.always.union(*(self.members[i] for i in self.chosen(step // self.interval)))


def embedding(model: nn.Module) -> frozenset[str]:
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
