"""OwLore: a few blocks train at a time, drawn by their share of outlier weights, with GaLore inside them.

Li, Yin, Gao and Liu, "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM
Fine-tuning", 2024 (later versions: "Outlier-weighed Layerwise Sampling for LLM Fine-tuning", OWS; section 3).

    A_ij = ||X_j||_2 |W_ij|              in each linear layer of a block; X_j is its input feature j over the tokens
    D_l  = #{A_ij > M mean(A)} / #A      over all linear layers of block l together, M = 13
    every K steps:  gamma blocks, drawn one after the other without replacement, with p_l = D_l / sum D

What stands outside of the blocks always trains. Inside of the blocks the paper takes GaLore (r = 256, T = 100,
alpha = 1); the optimizer is a part of its own, which a recipe with this schedule gets unless it names another.

The paper leaves open whether counts and mean are per matrix or per block; here they are pooled over the block, so that
a large matrix counts for as much as its numbers. Where we differ from the released code: D is computed from the data
at hand, not read from a file made elsewhere; a block that leaves gives its optimizer state up, while that code keeps
the state of every block ever drawn, and a block that comes back begins with a fresh projection, while there its basis
may be of long ago; too few blocks with outliers are an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.layer import describe, read_weight
from tunesmith.core.modelmap import block_linears, blocks
from tunesmith.core.part import part
from tunesmith.core.sampling import BlockSampling
from tunesmith.core.stats import collect
from tunesmith.errors import CheckpointError, TunesmithError

Mode = Literal["outlier", "reversed", "weight-norm", "increasing", "decreasing", "uniform"]
SCORED = ("outlier", "reversed")
"""Modes that look at the data."""


@part(
    paper="arXiv:2405.18380",
    refuses={"fsdp": "the optimizer state of sharded weights cannot be given up block by block"},
    implies={"optimizer": "galore"},
)
class OwLore(BlockSampling):
    """Blocks drawn by their outliers, anew every `interval` optimizer steps.

    A block is a numbered layer of the model that holds something that trains: whole layers in full fine-tuning, the
    adapters inside them otherwise, which are scored by the frozen weights below them. Those of an encoder-decoder are
    drawn from one urn. In a loop of one's own, call `calibrate(model, batches)` before the first step.

    Args:
        layers: gamma, the number of blocks that train at a time.
        interval: K, the number of optimizer steps until the next draw.
        threshold: M: a weight is an outlier if its |W_ij| ||X_j|| is above M times the mean over its block.
        mode: What the blocks are drawn by. `outlier`: the share of outliers; `reversed`: the largest share minus it;
            `weight-norm`: the norm of the block's linear layers; `increasing` and `decreasing`: 1, 2, ..., N from
            the first or to the last block; `uniform`: all alike, which is LISA's draw.
        freeze_embedding: Leave out the input embedding with its positions, norm and adapters, and with it a head that
            is tied to it. The backward pass then ends at the lowest block that trains.
        seed: Of the draws.
    """

    brisk: ClassVar[Mapping[str, object]] = {"layers": 1, "interval": 2, "threshold": 2.0}
    statistics: ClassVar[tuple[str, ...]] = ("input_square",)

    def __init__(
        self,
        *,
        layers: PositiveInt = 5,
        interval: PositiveInt = 50,
        threshold: PositiveFloat = 13.0,
        mode: Mode = "outlier",
        freeze_embedding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(layers=layers, interval=interval, freeze_embedding=freeze_embedding, seed=seed)
        self.threshold, self.mode = threshold, mode
        if mode not in SCORED:
            self.statistics = ()
        self.scores: Tensor | None = None
        """Per block of the model, trained or not: D_l, or the norm of its linear layers; (blocks,), float64."""

    def calibrate(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Collect `statistics` in one pass over the batches and hand them to `prepare`.

        Args:
            model: As it is before the first step; below an adapter the layer that it changes is looked at.
            batches: Keyword arguments of the model.
        """
        self.prepare(model, collect(model, _linears(model), batches, want=self.statistics))

    def prepare(self, model: nn.Module, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compute D of every block.

        Args:
            model: As in `calibrate`.
            statistics: `input_square` of every linear layer in the blocks.
        """
        norms = {name: held["input_square"].sqrt() for name, held in statistics.items()}
        ratios = [outlier_ratio(partial(_weighed, model, names, norms), self.threshold) for names in _by_block(model)]
        self.scores = torch.tensor(ratios, dtype=torch.float64)

    def on_attach(self) -> None:
        """Find the blocks that hold something that trains; look at their weights if the mode asks for that.

        Raises:
            TunesmithError: fewer blocks than `layers` can be drawn.
        """
        super().on_attach()
        assert self.model is not None
        if self.mode == "weight-norm":
            squares = [
                sum(float(w.square().sum(dtype=torch.float64)) for w in _weighed(self.model, names))
                for names in _by_block(self.model)
            ]
            self.scores = torch.tensor(squares, dtype=torch.float64).sqrt()
        if self.scores is not None:
            count = sum(map(len, blocks(self.model).values()))
            if len(self.scores) != count:
                raise TunesmithError(
                    f"owlore: the blocks that were scored are {len(self.scores)}, but {type(self.model).__name__} has "
                    f"{count}; call `schedule.calibrate` with this model"
                )
            self.weights_of_members()

    def weights_of_members(self) -> list[float] | None:
        """What each block that can train is drawn by, up to a factor.

        Raises:
            TunesmithError: the blocks have not been scored, or fewer than `layers` have a weight above zero.
        """
        count = len(self.members)
        if self.mode == "uniform":
            return None
        if self.mode in ("increasing", "decreasing"):
            ramp = [float(i + 1) for i in range(count)]
            return ramp if self.mode == "increasing" else ramp[::-1]
        if self.scores is None:
            raise TunesmithError(
                f"owlore: mode={self.mode!r} draws blocks by what the data shows of them, and none has been seen; call "
                "`schedule.calibrate(model, batches)` before the first step, or take mode='uniform'"
            )
        scores = self.scores[self.places]
        weights: list[float] = (scores.max() - scores if self.mode == "reversed" else scores).tolist()
        drawable = sum(w > 0 for w in weights)
        if drawable < self.layers:
            raise TunesmithError(
                f"owlore: layers={self.layers} blocks are to train at a time, but only {drawable} of the {count} that "
                f"can have a chance above zero with mode={self.mode!r} (shares of outliers: "
                f"{', '.join(f'{d:.3g}' for d in scores.tolist())}); lower `threshold` (now {self.threshold:g}) or "
                "`layers`, or take mode='uniform'"
            )
        return weights

    def probabilities(self) -> list[float]:
        """p of each block that can train, in the order of execution: the chance to be drawn first."""
        weights = self.weights_of_members() or [1.0] * len(self.members)
        return [w / sum(weights) for w in weights]

    def training_state(self) -> dict[str, Tensor]:
        """The scores: of the model as it was before the first step."""
        return {} if self.scores is None else {"scores": self.scores.clone()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the scores.

        Raises:
            CheckpointError: they are of another number of blocks.
        """
        scores, count = state["scores"], sum(map(len, blocks(self.model).values())) if self.model else 0
        if len(scores) != count:
            raise CheckpointError(
                f"owlore: the checkpoint has scores of {len(scores)} blocks, but the model has {count}; resume with "
                "the same model"
            )
        self.scores = scores.detach().to("cpu", torch.float64, copy=True)


def outlier_ratio(scores: Callable[[], Iterator[Tensor]], threshold: float) -> float:
    """The share of numbers above `threshold` times their mean, over several tensors together.

    Args:
        scores: Gives the tensors, none of them negative; called twice, so that one is held at a time.
        threshold: M.

    Raises:
        TunesmithError: there are no numbers, or they are not finite.
    """
    sizes, sums = [0], [0.0]
    for a in scores():
        sizes.append(a.numel())
        sums.append(float(a.sum(dtype=torch.float64)))
    count = sum(sizes)
    if not count or not isfinite(sum(sums)):
        raise TunesmithError(
            f"owlore: a block has {count} numbers in linear layers, with the sum {sum(sums)} of |W| ||X||; outliers "
            "are counted in linear layers of finite weights and inputs, and every block must have some"
        )
    limit = threshold * sum(sums) / count
    return sum(int((a > limit).sum()) for a in scores()) / count


def _linears(model: nn.Module) -> list[str]:
    """Names of the linear layers in the blocks themselves, also below adapters."""
    found = []
    for name in block_linears(model):
        while hasattr(model.get_submodule(name), "base_layer"):
            name = f"{name}.base_layer"
        found.append(name)
    return found


def _by_block(model: nn.Module) -> list[list[str]]:
    """The same, for each block in the order of execution."""
    linears = _linears(model)
    return [
        [name for name in linears if name.startswith(f"{stack}.{i}.")]
        for stack, held in blocks(model).items()
        for i in range(len(held))
    ]


def _weighed(model: nn.Module, names: Sequence[str], norms: Mapping[str, Tensor] | None = None) -> Iterator[Tensor]:
    """|W|, each column times the norm of its input feature if given; (out, in) each, float32."""
    for name in names:
        module = model.get_submodule(name)
        W = read_weight(module, describe(module, name)).detach().float().abs()
        yield W if norms is None else W * norms[name]
