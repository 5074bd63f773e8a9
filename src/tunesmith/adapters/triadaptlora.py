"""TriAdaptLoRA: a LoRA with a triangular core that grows during training in the layers where it changes most.

Liang, Wang and Zeng, "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
Fine-Tuning", arXiv:2501.08008.

    W' = W + (alpha / r) B C A,      A (r, in),  B (out, r),  C = L + U (r, r)
    block k of size a_k, r_k = a_1 + ... + a_k:  L has a row block (a_k, r_k), U a column block (r_k, a_k)

so that a new block appends rows and columns and leaves the rest in place; a diagonal block is there twice. Every
`interval` steps after the warm-up, while the total rank is below its budget, reference_rank x layers:

    F = |C|_F / blocks,   score of a layer = F - F at the check before
    the n layers of the largest scores get one more block;  mu = (t - t0) / (T - t0), gap = budget - total rank
    n = gap mu (`linear`),  exp(mu ln gap) (`exponential`),  top_k (`fixed`);  rounded down, 1 at least

All of `max_rank` is there from the start and the part that has not grown is idle: it is zero and has no gradient. So
tensors keep their shapes, and optimizers, several processes and resumed runs need to know nothing. L and U are vectors,
block after block, of which the grown part is a prefix. The price: memory of `max_rank`, and AdamW has no bias
correction left for entries that begin late; with its defaults their first 100 steps are 3 to 6.5 times as long.

A and B begin at N(0, 0.02^2) and C at zero, in the first and in every later block, so that growth does not change the
function. With `rescale_on_growth` the old part of C is multiplied by r_new / r_old, which the scale is divided by, and
the F to compare with next is that after the growth: only what is learned counts, not the rescaling and the new block.

The paper's start is not established, and in the released code most is zero: with B = C = 0 no gradient ever moves. Its
bare alpha / r halves the change of a layer that grows from 1 to 2. Layers with equal scores grow together there, above
the budget; here the earlier ones do. Any increment works, not those of a table only. The orthogonality term is the
released one, the mean of |F F^T - I|_F over all A and B^T, added as in AdaLoRA.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.adapters.adalora import TWICE, Penalty, steps_of
from tunesmith.core.adapter import Step
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank, matrix_shape
from tunesmith.core.part import part
from tunesmith.core.ranks import RankTable, largest
from tunesmith.core.seeds import generator
from tunesmith.core.steps import in_force
from tunesmith.errors import RecipeError

STD = 0.02


@part(
    paper="arXiv:2501.08008",
    tags=("mergeable", "low-rank"),
    refuses={"fsdp": "a growth fills in parts of tensors that every process must hold whole"},
)
class TriAdaptLoRA(LowRank):
    """A LoRA whose rank grows block by block.

    Args:
        layer: A linear, convolution or embedding layer.
        init_rank: Size of the first block.
        reference_rank: Mean rank of the layers at the end: the budget is this times the layers.
        max_rank: The largest rank of one layer, for which memory is set aside; twice the reference rank if not given.
        increment: Size of a later block; half of the reference rank if not given. The last may be smaller.
        alpha: The factor in front is alpha / r, r the rank of this moment.
        dropout: On the input of A while training.
        warmup: Steps before the first growth; below 1 a share of the run.
        interval: Steps between two growths; below 1 a share of the run, at least one step.
        growth: How many layers grow at a time.
        top_k: Layers that grow at a time with `growth="fixed"`.
        rescale_on_growth: Keep the function as the rank, and with it the scale, changes. False as in released code.
        start: Of a block: `zero-core` (C = 0), or `identity-core` (its diagonal 1, B = 0).
        orthogonality: Weight of the orthogonality term; 0 turns it off.
        seed: Of what later blocks start from.
    """

    brisk: ClassVar[Mapping[str, object]] = {"reference_rank": 4, "warmup": 0, "interval": 1}
    grown: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        init_rank: PositiveInt = 1,
        reference_rank: PositiveInt = 8,
        max_rank: PositiveInt | None = None,
        increment: PositiveInt | None = None,
        alpha: PositiveFloat = 16.0,
        dropout: NonNegativeFloat = 0.0,
        warmup: NonNegativeFloat = 0.1,
        interval: PositiveFloat = 0.05,
        growth: Literal["linear", "exponential", "fixed"] = "linear",
        top_k: PositiveInt = 1,
        rescale_on_growth: bool = True,
        start: Literal["zero-core", "identity-core"] = "zero-core",
        orthogonality: NonNegativeFloat = 0.5,
        seed: int = 0,
    ) -> None:
        most = 2 * reference_rank if max_rank is None else max_rank
        if not init_rank <= reference_rank <= most:
            raise RecipeError(
                "triadaptlora: rank grows from init_rank to reference_rank on average and at most to max_rank; found "
                f"{init_rank}, {reference_rank} and {most}"
            )
        step = increment or max(reference_rank // 2, 1)
        self.ends = [*range(init_rank, most, step), most]
        self.alpha, self.reference_rank, self.seed = alpha, reference_rank, seed
        self.warmup, self.interval, self.growth, self.top_k = warmup, interval, growth, top_k
        self.rescale_on_growth, self.start, self.gamma = rescale_on_growth, start, orthogonality
        self.penalty = Penalty(squared=False)
        super().__init__(layer, most, dropout)

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        """What the orthogonality term cannot be combined with."""
        without = "the orthogonality term is added to gradients, which that optimizer does not make; set it to 0"
        return {"orthogonality": TWICE, "forward-only": without} if options["orthogonality"] else {}

    def resize(self, rank: int) -> None:
        super().resize(rank)
        spans = list(itertools.pairwise([0, *self.ends]))
        rows = [torch.cartesian_prod(torch.arange(a, b), torch.arange(b)) for a, b in spans]
        self.sizes = list(itertools.accumulate(len(block) for block in rows))
        device = self.layer.device
        # The place in C of each number of L; that of U is its mirror image.
        self.register_buffer("at", torch.cat(rows).T.contiguous().to(device), persistent=False)
        self.register_buffer("grown", torch.zeros((), dtype=torch.long, device=device))
        self.lower = nn.Parameter(torch.zeros(self.sizes[-1], device=device))
        self.upper = nn.Parameter(torch.zeros(self.sizes[-1], device=device))
        nn.init.zeros_(self.A)
        self.blocks = 0
        self._grow(None)

    @property
    def current(self) -> int:
        """r: the rank grown so far."""
        return self.ends[self.blocks - 1]

    def core(self) -> Tensor:
        """C, (r, r)."""
        used, r = self.sizes[self.blocks - 1], self.current
        i, j = self.at[:, :used]
        empty = self.lower.new_zeros(r, r)
        return empty.index_put((i, j), self.lower[:used]) + empty.index_put((j, i), self.upper[:used])

    def factors(self) -> tuple[Tensor, Tensor, float]:
        r = self.current
        A, B = self.penalty("A", self.A[:r]), self.penalty("B", self.B[:, :r].T).T
        return B, self.core() @ A, self.alpha / r

    def orthogonality(self) -> Tensor:
        """|A A^T - I|_F + |B^T B - I|_F of the grown part, (), differentiable."""
        return self.penalty.value(self.A[: self.current], self.B[:, : self.current].T)

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            made.penalty.begin(made.gamma / (2 * len(adapters)))
        first, t, total = adapters[0], step.number, step.needs_total("triadaptlora")
        warmup, interval = steps_of(first.warmup, total), max(steps_of(first.interval, total), 1)
        gap = first.reference_rank * len(adapters) - sum(made.current for made in adapters)
        if gap <= 0 or t <= warmup or t % interval:
            return
        mu = (t - warmup) / (total - warmup)
        n = {"linear": gap * mu, "exponential": math.exp(mu * math.log(gap)), "fixed": first.top_k}[first.growth]
        scores = {}
        for i, made in enumerate(adapters):
            before, made.importance = made.importance, made._norm() / made.blocks
            if made.blocks < len(made.ends):
                scores[str(i)] = (made.importance - before.to(made.importance.device)).view(1)
        if not scores:
            return
        for key, chosen in largest(scores, max(int(n), 1)).items():
            if chosen:
                made = adapters[int(key)]
                made._grow(generator(made.seed, "triadaptlora", made.layer.name, made.blocks))

    @classmethod
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            made.penalty.weight = 0.0

    def _norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.core().detach())

    @torch.no_grad()
    def _grow(self, draws: torch.Generator | None) -> None:
        """Start the next block; from torch's own generator if none is given."""
        a, b = 0 if not self.blocks else self.current, self.ends[self.blocks]
        used = self.sizes[self.blocks - 1] if self.blocks else 0
        if self.blocks and self.rescale_on_growth:
            self.lower[:used] *= b / a
            self.upper[:used] *= b / a
        self.lower[used:], self.upper[used:] = 0, 0
        out_features, in_features = matrix_shape(self.layer)
        self.A[a:b] = STD * torch.randn(b - a, in_features, generator=draws).to(self.A)
        self.B[:, a:b] = STD * torch.randn(out_features, b - a, generator=draws).to(self.B)
        self.blocks += 1
        self.grown.fill_(self.blocks)
        if self.start == "identity-core":
            self.B[:, a:b] = 0
            i, j = self.at[:, used : self.sizes[self.blocks - 1]]
            self.lower[used : self.sizes[self.blocks - 1]] = (i == j).to(self.lower)
        if self.blocks == 1 or self.rescale_on_growth:
            self.importance = self._norm() / self.blocks

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.blocks = int(self.grown)  # shapes are decided without asking the device

    def training_state(self) -> dict[str, Tensor]:
        return {"importance": self.importance}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.importance = state["importance"].clone()


def allocation(model: nn.Module) -> RankTable:
    """The rank that each TriAdaptLoRA layer has now, for another adapter's `ranks`."""
    found = {m.layer.name: m.current for m in in_force(model) if isinstance(m, TriAdaptLoRA)}
    return RankTable(found, source="TriAdaptLoRA")
