"""LIFT: AdamW on the weights that are largest after rank reduction, chosen anew every T steps.

Liu, Pang, Balabanov, Yang, Huang, Yin, Yang and Liu, "LIFT the Veil for the Truth: Principal Weights Emerge after Rank
Reduction for Reasoning-Focused Supervised Fine-Tuning", ICML 2025.

For each weight W, (m, n), with the rank-r approximation W_r = U_r S_r V_r^T:

    the mask: the K entries where |W_r| is largest,  K = min(R (m + n), m n)
    each step: AdamW on these entries alone, its moments (K,)
    before the steps T, 2T, ... : a new mask; moments of entries in both are kept, new ones start at 0

R is the rank of a LoRA with as many trainable numbers, r the rank of the filter. The step count of Adam goes on over
refreshes, so that new entries start without a bias correction of their own, as in the released code.

Where we differ from the released code: its shipped setting, `lift_sparse`, takes the K SMALLEST entries, since it looks
for the word "largest" in the setting's name; the paper takes the largest, and so do we. Ties go to the first, so that K
is exact; the randomised SVD is drawn from its own keys, so that a resumed run is bitwise the same. Weights of more
than two dimensions are taken as (out, all else). Dense gradients still exist: 12 bytes per entry is the promise of the
optimizer's state alone; `per_layer` bounds the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tunesmith.core.entryspace import EntrySpace, freeze, largest_places, task_head
from tunesmith.core.gradspace import GradSpace, State
from tunesmith.core.part import part
from tunesmith.core.projected import Beta, ProjectedAdamW
from tunesmith.core.seeds import forked
from tunesmith.errors import TunesmithError

Svd = Literal["exact", "randomised"]


class PrincipalSpace(EntrySpace):
    """The K largest entries of a weight's low-rank approximation.

    Args:
        p: The weight.
        group: Its group, with the keys `rank`, `filter_rank`, `period`, `svd`, `iterations` and `bits`.
    """

    def __init__(self, p: Tensor, group: Mapping[str, Any]) -> None:
        m, n = p.shape[0], p.shape[1:].numel()
        super().__init__(p, min(group["rank"] * (m + n), m * n), group["bits"])
        self.filter_rank, self.period = group["filter_rank"], group["period"]
        self.svd, self.iterations = group["svd"], group["iterations"]

    def due(self, state: State) -> bool:
        return (state["step"] + 1) % self.period == 0

    def choose(self, p: nn.Parameter, state: State, name: str) -> Tensor:
        """Places of the principal weights.

        Raises:
            TunesmithError: the weight is not finite.
        """
        W = p.detach().flatten(1).to(torch.promote_types(p.dtype, torch.float32))
        if not bool(W.isfinite().all()):
            raise TunesmithError(
                f"the weight {name}, shape {tuple(p.shape)}, is not finite at step {state['step']}, where its largest "
                "entries are to be chosen; lower the learning rate"
            )
        rank = min(self.filter_rank, *W.shape)
        if rank == min(W.shape):
            return largest_places(W.abs(), self.count)
        if self.svd == "exact":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            with forked("lift", name, state["step"], device=W.device):
                U, S, V = torch.svd_lowrank(W, q=min(2 * rank, *W.shape), niter=self.iterations)
            Vh = V.T
        return largest_places(((U[:, :rank] * S[:rank]) @ Vh[:rank]).abs(), self.count)


@part(
    paper="arXiv:2506.00772",
    refuses={
        "fsdp": "the singular vectors are of a whole matrix, and a sharded one is not whole on any process",
        "adapters": "the weights under an adapter are frozen, so there are none of them to choose from",
        "prompts": "the weights under a prompt are frozen, so there are none of them to choose from",
    },
)
class LIFT(ProjectedAdamW):
    """AdamW on the principal weights.

    A group whose `rank` is None gets plain AdamW, and so does every tensor of one dimension; `groups` gives the linear
    layers in the blocks a rank. All options but `per_layer` and `train_rest` can be set per group.

    Args:
        params: Parameters or groups; `LIFT.groups(model)` makes them.
        lr: Learning rate; 1e-4 to 2e-4 in the paper.
        weight_decay: Decoupled, on the chosen entries alone.
        rank: R, of a LoRA with as many trainable numbers: about 5 % of a large model's weights at 128.
        filter_rank: r; 32 for 1B, 64 for 3B and 7B, 128 for 8B. From the smaller side of a weight on nothing is
            filtered, and its largest entries are chosen.
        period: T, steps of a weight between two choices.
        svd: `exact`, or `randomised` with 2 r columns for large matrices.
        iterations: Power iterations of the randomised one.
        train_rest: Train embeddings, norms, biases and the language-model head too, by plain AdamW; the paper freezes
            them. A classification head always trains so.
        betas: Of Adam.
        eps: Added to the root of the second moment before the bias correction.
        bits: 8 keeps moments of 4096 numbers and more in 8 bits; needs bitsandbytes (`tunesmith[quant]`).
        per_layer: Update inside the backward pass and free each gradient at once.
    """

    brisk: ClassVar[Mapping[str, object]] = {"rank": 4, "filter_rank": 4, "period": 3}

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        *,
        rank: PositiveInt = 128,
        filter_rank: PositiveInt = 64,
        period: PositiveInt = 400,
        svd: Svd = "exact",
        iterations: NonNegativeInt = 2,
        train_rest: bool = False,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: NonNegativeFloat = 1e-6,
        bits: Literal[32, 8] = 32,
        per_layer: bool = False,
    ) -> None:
        choice = {"rank": rank, "filter_rank": filter_rank, "period": period, "svd": svd, "iterations": iterations}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=bits,
            per_layer=per_layer,
            **choice,
        )

    @classmethod
    def groups(
        cls, model: nn.Module, *, weight_decay: float = 0.0, train_rest: bool = False, **options: Any
    ) -> list[dict[str, Any]]:
        """The weights of the blocks' linear layers, masked; then what else trains, in groups of plain AdamW.

        Without `train_rest` everything else in the model is frozen here (`requires_grad`), but a classification head.

        Raises:
            ModelError: no weight of a linear layer in the blocks trains.
        """
        masked, *rest = super().groups(model, weight_decay=weight_decay, **options)
        if train_rest:
            return [masked, *rest]
        heads = task_head(model)
        freeze(p for group in rest for name, p in group["params"] if name not in heads)
        kept = [{**group, "params": [entry for entry in group["params"] if entry[0] in heads]} for group in rest]
        return [masked, *(group for group in kept if group["params"])]

    def space(self, p: Tensor, group: dict[str, Any]) -> GradSpace:
        return GradSpace() if group["rank"] is None or p.dim() < 2 else PrincipalSpace(p, group)
