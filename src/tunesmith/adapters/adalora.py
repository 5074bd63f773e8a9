"""AdaLoRA: start every layer with more rank than it gets, and take away what matters least over the whole model.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.

    W' = W + (alpha / r0) P diag(lambda) Q,    P (out, r0) and Q (r0, in) near orthonormal, lambda (r0)   (section 3.1)
    loss + gamma sum over the layers of |P^T P - I|_F^2 + |Q Q^T - I|_F^2                                (section 3.1)
    score of triplet i = s(lambda_i) + mean s(P_:i) + mean s(Q_i:),   s = smoothed |w dL/dw| times its deviation
                                                                                                         (section 3.2)
    budget b(t) = b0 until tinit, then bT + (b0 - bT)(1 - (t - tinit) / (T - tfinal - tinit))^3, then bT (section 3.3)

At step t only the b(t) best triplets of all layers keep their lambda, every `delta_t` steps; the others are set to zero
and may come back until the next time. At step T - tfinal it is decided for good. P and Q are called B and A here.

What gamma's term adds to the gradients of A and B depends on that layer alone, so the adapter adds it itself, in the
backward pass of the first micro-batch of a step that reaches the layer. All processes add the same: so is their mean.

Differences. From the paper: its budget formula subtracts tfinal in the numerator as well, so that the curve begins
above b0; peft and the authors' code do what is written above. From both programs: their penalty is the mean over all A
and B of the norm, not squared (`penalty="norm"`), whose slope is 4 n |A A^T - I|_F times smaller with n layers, about
700 for 72 layers of rank 12; budgets are met exactly where scores are equal; a run with tfinal = 0 ends at its target
too, where theirs ends a step before; init_rank = target_rank works (peft raises). The scale is alpha / r0, not
alpha / (r0 + 1e-5). All else is theirs: lambda takes the same values as in peft, step by step. Mind that peft adds no
penalty at all to a model without a task type, whose forward pass it goes around.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.core.adapter import Step
from tunesmith.core.importance import Smoothed, sensitivity
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank
from tunesmith.core.part import part
from tunesmith.core.ranks import RankTable, largest
from tunesmith.core.steps import in_force
from tunesmith.errors import ModelError, RecipeError, TunesmithError

TWICE = "it adds that term itself; set its option orthogonality to 0, or leave the regulariser out"
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Penalty:
    """gamma R in the gradients of a layer's factors, once per optimizer step.

    R is |F F^T - I|_F^2, or the norm itself, summed over the factors F (r, d) with the components in rows.

    Args:
        squared: Whether the norm is squared.
    """

    def __init__(self, squared: bool) -> None:
        self.squared, self.weight, self.owed = squared, 0.0, set[str]()

    def begin(self, weight: float) -> None:
        """A step begins, in which each factor gets the slope of `weight` R; set `weight` to 0 when it ends."""
        self.weight, self.owed = weight, {"A", "B"}

    def __call__(self, name: str, factor: Tensor) -> Tensor:
        """The factor itself, (r, d); wrapped in the whole step, so that a block that is run again saves the same."""
        if not self.weight:
            return factor
        device = factor.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ModelError(
                "gradients of fp16 training are scaled by a factor that adapters do not know, so that they cannot add "
                "the orthogonality term: train in bf16 or float32, or set orthogonality=0 and add it as a regulariser"
            )
        return _Penalised.apply(factor, self, name)

    def value(self, *factors: Tensor) -> Tensor:
        """R, ()."""
        norms = torch.stack([torch.linalg.matrix_norm(_excess(f)) for f in factors])
        return (norms.square() if self.squared else norms).sum()

    def slope(self, factor: Tensor) -> Tensor:
        """dR/dF, (r, d): 4 (F F^T - I) F, or 2 (F F^T - I) F / |F F^T - I|_F."""
        excess = _excess(factor)
        if self.squared:
            return 4 * excess @ factor
        return 2 * excess @ factor / torch.linalg.matrix_norm(excess).clamp_min(1e-30)


class _Penalised(torch.autograd.Function):
    """Nothing in the forward pass; backward adds what is still owed to the factor in this step."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, penalty: Penalty, name: str) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.penalty, ctx.name = penalty, name
        return factor.view_as(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.name in ctx.penalty.owed:
            ctx.penalty.owed.remove(ctx.name)
            gradient = gradient + ctx.penalty.weight * ctx.penalty.slope(*ctx.saved_tensors)
        return gradient, None, None


def _excess(factor: Tensor) -> Tensor:
    return factor @ factor.T - torch.eye(len(factor), dtype=factor.dtype, device=factor.device)


def steps_of(given: float, total: int) -> int:
    """Steps: a share of the run below 1, else the number itself, rounded down."""
    return int(given * total) if given < 1 else int(given)


@part(
    paper="arXiv:2303.10512",
    tags=("mergeable", "low-rank"),
    refuses={
        "fsdp": "the score of a triplet needs its whole column of P and row of Q, which sharding takes apart",
        "forward-only": "triplets are scored by gradients, and that optimizer makes none",
    },
)
class AdaLoRA(LowRank):
    """A LoRA in the form of a singular value decomposition whose rank is shared out among the layers.

    Args:
        layer: A linear, convolution or embedding layer.
        init_rank: r0 of every layer at the start; peft's `init_r`. The paper takes 1.5 times the target.
        target_rank: Mean rank of the layers at the end; peft's `target_r`. A layer may end with none.
        alpha: The factor in front is alpha / init_rank throughout. 32 is that of the scripts with these ranks.
        dropout: On the input of A while training.
        tinit: Steps before anything is taken away; below 1 a share of the run. The scripts have about a tenth.
        tfinal: Steps at the end in which the ranks stay; below 1 a share of the run. The scripts have about half.
        delta_t: Steps between two allocations; peft's `deltaT`. The scripts have 1 to 100.
        beta1: Of the smoothed sensitivity.
        beta2: Of its smoothed deviation.
        score: `smoothed` (the paper's), `mean` (smoothed, without the deviation), `sensitivity` (that of this step), or
            `magnitude` (|lambda| alone).
        orthogonality: gamma; peft's `orth_reg_weight`. 0 turns the term off.
        penalty: `squared` norms summed over the layers (the paper's) or the mean `norm` (peft's).
    """

    brisk: ClassVar[Mapping[str, object]] = {"init_rank": 4, "target_rank": 2, "delta_t": 1}
    kept: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        init_rank: PositiveInt = 12,
        target_rank: PositiveInt = 8,
        alpha: PositiveFloat = 32.0,
        dropout: NonNegativeFloat = 0.0,
        tinit: NonNegativeFloat = 0.1,
        tfinal: NonNegativeFloat = 0.5,
        delta_t: PositiveInt = 10,
        beta1: Momentum = 0.85,
        beta2: Momentum = 0.85,
        score: Literal["smoothed", "mean", "sensitivity", "magnitude"] = "smoothed",
        orthogonality: NonNegativeFloat = 0.1,
        penalty: Literal["squared", "norm"] = "squared",
    ) -> None:
        if target_rank > init_rank:
            raise RecipeError(f"adalora: target_rank ({target_rank}) can be at most init_rank ({init_rank})")
        super().__init__(layer, init_rank, dropout)
        self.alpha, self.target_rank = alpha, target_rank
        self.tinit, self.tfinal, self.delta_t = tinit, tfinal, delta_t
        self.score, self.gamma = score, orthogonality
        still = score == "sensitivity"
        self.smoothed = Smoothed(0.0 if still else beta1, beta2, uncertainty=score == "smoothed")
        self.penalty = Penalty(squared=penalty == "squared")

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        """It adds the term itself unless told not to."""
        return {"orthogonality": TWICE} if options["orthogonality"] else {}

    def resize(self, rank: int) -> None:
        super().resize(rank)
        self.E = nn.Parameter(torch.zeros(rank, 1, device=self.layer.device))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=self.layer.device))
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        A, B = self.penalty("A", self.A), self.penalty("B", self.B.T).T
        return B, A * self.E, self.alpha / self.rank

    def orthogonality(self) -> Tensor:
        """R of this layer, (), differentiable."""
        return self.penalty.value(self.A, self.B.T)

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            made._plan(step)
            made.penalty.begin(made.gamma if made.penalty.squared else made.gamma / (2 * len(adapters)))

    @classmethod
    @torch.no_grad()
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        first, t = adapters[0], step.number
        tinit, last, final = first._plan(step)
        for made in adapters:
            made.penalty.weight = 0.0
            if t < last:
                made._observe()
        budget = first.target_rank * len(adapters)
        kept = sum(int(made.kept.sum()) for made in adapters) if t > final else 0
        if t == final or kept > budget:
            cls._allocate(adapters, budget)
            for made in adapters:  # nothing is scored any more
                made.smoothed.mean.clear()
                made.smoothed.deviation.clear()
        elif t > final:
            for made in adapters:
                made.E[~made.kept] = 0
        elif t > tinit and t % first.delta_t == 0:
            left = 1 - (t - tinit) / (last - tinit)
            most = first.rank * len(adapters)
            cls._allocate(adapters, int((most - budget) * left**3 + budget))

    def _plan(self, step: Step) -> tuple[int, int, int]:
        """(tinit, the step from which the budget is the target, the step at which it is decided for good)."""
        total = step.needs_total("adalora")
        tinit, tfinal = steps_of(self.tinit, total), steps_of(self.tfinal, total)
        if tinit + tfinal >= total:
            raise TunesmithError(
                f"adalora: tinit ({tinit}) and tfinal ({tfinal}) leave none of the {total} steps of the run for taking "
                "rank away; give fewer, or shares of the run (below 1)"
            )
        return tinit, total - tfinal, min(total - tfinal, total - 1)

    def _observe(self) -> None:
        """Take in the sensitivities of this step; a layer that the step did not reach has none."""
        if self.score == "magnitude":
            return
        for name, p in (("E", self.E), ("A", self.A), ("B", self.B)):
            if p.grad is not None:
                self.smoothed.update(name, sensitivity(p))

    def _scores(self) -> Tensor:
        """Of each triplet, (r0,)."""
        if self.score == "magnitude":
            return self.E.detach().abs().squeeze(1)
        found = torch.zeros_like(self.E).squeeze(1)
        for name, dim in (("E", 1), ("A", 1), ("B", 0)):
            if name in self.smoothed.mean:
                s = self.smoothed.mean[name]
                found += (s * self.smoothed.deviation[name] if self.smoothed.uncertainty else s).mean(dim)
        return found

    @classmethod
    def _allocate(cls, adapters: Sequence[Self], budget: int) -> None:
        scores = {str(i): made._scores() for i, made in enumerate(adapters)}
        if adapters[0].score != "magnitude" and not any(made.smoothed.mean for made in adapters):
            raise TunesmithError(
                "adalora: no step has left a gradient to score by; call zero_grad() after the block of `tunesmith.step`"
            )
        for made, (name, count) in zip(adapters, largest(scores, budget).items(), strict=True):
            order = torch.sort(scores[name], descending=True, stable=True).indices
            made.kept.fill_(False)
            made.kept[order[:count]] = True
            made.E[~made.kept] = 0

    def training_state(self) -> dict[str, Tensor]:
        return self.smoothed.state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.smoothed.load(state)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        B, A, scale = self.factors()
        live = self.E.detach().squeeze(1) != 0
        live[0] |= not bool(live.any())  # no LoRA has rank 0: a layer without any keeps one component that is zero
        return (scale * B[:, live]).detach(), A[live].detach()


def allocation(model: nn.Module) -> RankTable:
    """The rank that each AdaLoRA layer has now, for another adapter's `ranks`."""
    found = {m.layer.name: int((m.E != 0).sum()) for m in in_force(model) if isinstance(m, AdaLoRA)}
    return RankTable(found, source="AdaLoRA")
