"""IST: the adapters of a few blocks train in each step, drawn by an importance that is learned by turning blocks down.

Yao, Gao, Li, Zhao, Wang, Wang and Zhu, "Layer-wise Importance Matters: Less Memory for Better Performance in
Parameter-efficient Fine-tuning of Large Language Models", Findings of EMNLP 2024 (Importance-aware Sparse Tuning: a
fine-tuning loop and an importance updating loop, Fig. 3).

    every step:       n_u = floor(N / 4) of the N blocks train, drawn without replacement with weights sigma(-I)
    every 10 steps:   K = 3 different sets S_k of n_v = floor(N / 2) blocks, drawn likewise with weights sigma(I)
                      L_k = loss with the adapter outputs of S_k times 0.25;   r_k = exp(-L_k);   a_k = r_k - mean(r)
                      I_i <- I_i + 10 sum over k with i in S_k of a_k p_i (1 - p_i),   p = sigma(I) before the update

I starts at 0 and is high where a block is not needed. The method learns only where exp(-L) is not small: from a loss
of 5 nats the rewards differ by less than 0.007. The constants are those of the released code.

Where we differ from that code: L_k comes from the batches of the step that begins, the same in every process, and not
from 16 further rows of each process; the search for three different sets ends (there it goes on for ever where a model
of two blocks has no three, or the scores have collapsed); at least one block trains. What the paper leaves open and the
code does is the default here: blocks that rest keep their optimizer state, against the habit of this room, because a
block seldom trains for two steps on end. Without it the loss of the claim's comparison is 0.279 instead of 0.188 nats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import comb, floor
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.gates import gated_layers, scaled
from tunesmith.core.modelmap import blocks
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import generator
from tunesmith.errors import CheckpointError, TunesmithError

ATTEMPTS = 100
"""Draws per set looked for; when this many give too few different ones, the scores have long decided."""


@dataclass(frozen=True)
class Block:
    """A block that can train.

    Attributes:
        name: Its dotted path.
        parameters: Names of what trains in it.
        layers: Names of its layers with adapters.
    """

    name: str
    parameters: frozenset[str]
    layers: tuple[str, ...]


@part(
    paper="arXiv:2410.11772",
    refuses={
        "fsdp": "what trains of a sharded weight cannot change from step to step",
        "full-finetuning": "a block's importance is seen by turning its adapters down; take `lisa` for base weights",
    },
)
class IST(Schedule):
    """Blocks drawn in every step, by importance.

    A block is a numbered layer of the model that holds adapters; those of an encoder-decoder are drawn from one urn.

    Args:
        fraction: Of the blocks that train in a step, rounded down, at least one.
        suppressed: Share of the blocks that a measurement turns down, rounded down, at least one.
        factor: What the adapter outputs of these are multiplied by; 1 teaches nothing.
        samples: K, the measurements of one update, each with other blocks turned down. Each costs a forward pass.
        interval: Optimizer steps from one update of the scores to the next.
        score_lr: Learning rate of the scores.
        sampling: `uniform` draws the blocks that train evenly and measures nothing: the paper's baseline RST.
        keep_state: Whether a block that rests keeps its optimizer state, as in the released code. Without, memory is
            that of the blocks that train, but Adam begins anew whenever a block is drawn, which is nearly every time:
            its steps are then close to the sign of one gradient.
        seed: Of the draws.
    """

    brisk: ClassVar[Mapping[str, object]] = {"interval": 2}
    measures: ClassVar[bool] = True
    adapters_only: ClassVar[bool] = True

    def __init__(
        self,
        *,
        fraction: Annotated[float, Field(gt=0, le=1)] = 0.25,
        suppressed: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        factor: Annotated[float, Field(ge=0, le=1)] = 0.25,
        samples: Annotated[int, Field(ge=2)] = 3,
        interval: PositiveInt = 10,
        score_lr: PositiveFloat = 10.0,
        sampling: Literal["importance", "uniform"] = "importance",
        keep_state: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.fraction, self.suppressed, self.factor = fraction, suppressed, factor
        self.samples, self.interval, self.score_lr = samples, interval, score_lr
        self.sampling, self.keeps_state, self.seed = sampling, keep_state, seed
        self.members: list[Block] = []
        self.always: frozenset[str] = frozenset()
        self.scores = torch.zeros(0, dtype=torch.float64)
        """I of each block; high is not needed."""

    def on_attach(self) -> None:
        """Find the blocks and their adapters; all scores start at 0.

        Raises:
            TunesmithError: no block holds anything that trains, or one that does has no adapter to turn down.
            ModelError: the model has no blocks, or a PEFT adapter whose output has no scale.
        """
        assert self.model is not None
        names = {id(p): name for name, p in self.eligible.items()}
        learned = self.sampling == "importance"
        gates = {id(self.model.get_submodule(name)): name for name in gated_layers(self.model)} if learned else {}
        found = [
            Block(
                f"{stack}.{i}",
                frozenset(names[id(p)] for p in block.parameters() if id(p) in names),
                tuple(gates[id(module)] for module in block.modules() if id(module) in gates),
            )
            for stack, held in blocks(self.model).items()
            for i, block in enumerate(held)
        ]
        self.members = [block for block in found if block.parameters]
        self.always = frozenset(self.eligible).difference(*(block.parameters for block in found))
        self.scores = torch.zeros(len(self.members), dtype=torch.float64)
        if not self.members:
            raise TunesmithError(
                f"ist: blocks take turns in training, but none of the {len(found)} blocks of "
                f"{type(self.model).__name__} holds anything that trains; put adapters on layers inside of the blocks"
            )
        bare = [block.name for block in self.members if not block.layers]
        if learned and bare:
            raise TunesmithError(
                f"ist: what a block is worth is seen by turning its adapters down, but {bare[0]!r} and {len(bare) - 1} "
                "other blocks train without any; put adapters on them, freeze them, or take the schedule `lisa`"
            )

    def active(self, step: int) -> Collection[str]:
        if self.sampling == "importance" and step > 0 and step % self.interval == 0:
            self._learn(step)
        return self.always.union(*(self.members[i].parameters for i in self.chosen(step)))

    def chosen(self, step: int) -> list[int]:
        """The blocks that train in a step under the scores of now, ascending."""
        return _draw(F.logsigmoid(-self.scores), self.fraction, generator(self.seed, "ist", "trained", step))

    def importance(self) -> list[dict[str, str | float]]:
        """What was learned, as plain data: one row per block, in the order of execution.

        Returns:
            `block`, its path; `score`, I; `weight`, sigma(-I) in 0 to 1, with which it is drawn: high is important,
            and 0.5 is where all begin.
        """
        weights = (-self.scores).sigmoid().tolist()
        rows = zip(self.members, self.scores.tolist(), weights, strict=True)
        return [{"block": block.name, "score": score, "weight": weight} for block, score, weight in rows]

    def suppressions(self, step: int) -> list[list[int]]:
        """The different sets of blocks that the update of a step turns down: `samples`, or as many as there are."""
        g, weights = generator(self.seed, "ist", "suppressed", step), F.logsigmoid(self.scores)
        wanted = min(self.samples, comb(len(weights), _count(len(weights), self.suppressed)))
        found: list[list[int]] = []
        for _ in range(ATTEMPTS * wanted):
            drawn = _draw(weights, self.suppressed, g)
            if drawn not in found:
                found.append(drawn)
            if len(found) == wanted:
                break
        return found

    def _learn(self, step: int) -> None:
        assert self.model is not None
        subsets = self.suppressions(step)
        if len(subsets) < 2:
            return  # nothing to compare with
        losses = []
        for subset in subsets:
            with scaled(self.model, {name: self.factor for i in subset for name in self.members[i].layers}):
                losses.append(self.measure())
        rewards = (-torch.tensor(losses, dtype=torch.float64)).exp()
        if not bool(rewards.isfinite().all()):
            raise TunesmithError(
                f"ist: the losses with blocks turned down are {losses} at step {step + 1}, but exp(-loss) must be "
                "finite; lower the learning rate, or take another objective if its loss is not bounded below"
            )
        above = rewards - rewards[0]  # equal losses must not move the scores by a rounding of their mean
        p = self.scores.sigmoid()
        pull = self.score_lr * p * (1 - p)
        for subset, advantage in zip(subsets, above - above.mean(), strict=True):
            self.scores[subset] += advantage * pull[subset]

    def training_state(self) -> dict[str, Tensor]:
        """The scores; the draws depend on them, the seed and the step."""
        return {"scores": self.scores.clone()} if self.sampling == "importance" else {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the scores.

        Raises:
            CheckpointError: they are of another number of blocks, or of a run that draws by them.
        """
        scores = state["scores"]
        if self.sampling == "uniform":
            raise CheckpointError(
                "ist: the checkpoint is of a run with learned scores, but this one draws with sampling='uniform'; "
                "resume with sampling='importance'"
            )
        if scores.shape != self.scores.shape:
            raise CheckpointError(
                f"ist: the checkpoint has scores of {len(scores)} blocks, but {len(self.scores)} hold adapters here; "
                "resume with the same model and adapters"
            )
        self.scores = scores.detach().to("cpu", torch.float64, copy=True)


def _count(n: int, share: float) -> int:
    return max(1, floor(n * share + 1e-9))  # 0.29 * 100 is a little below 29


def _draw(log_weights: Tensor, share: float, g: torch.Generator) -> list[int]:
    """A share of the blocks, one after the other without replacement, by weights that may be too small for a float.

    The largest of log w + Gumbel noise are such a draw.
    """
    noise = torch.empty_like(log_weights).exponential_(generator=g)
    return sorted((log_weights - noise.log()).topk(_count(len(log_weights), share)).indices.tolist())
