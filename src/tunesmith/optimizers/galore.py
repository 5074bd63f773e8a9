"""GaLore: Adam on a rank-r projection of the gradient, while the weights stay full rank.

Zhao, Zhang, Chen, Wang, Anandkumar and Tian, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
ICML 2024.

    every T steps of a weight:  G = U S V^T,  Q = V^T[:r] if m >= n, else P = U[:, :r]                  (Definition 3.6)
    R = G Q^T or P^T G,  N = Adam's M / (sqrt(V) + eps) of R,  W <- W - lr_k alpha N Q or P N             (Algorithm 2)

The moments are neither reset nor rotated when the projection changes. Where we differ from the released code: the side
is what was projected, not what the shape of the projected gradient suggests, which for `reverse_std`, m < n and r = m
takes the wrong one; the moments of bf16 weights are float32, not bf16, and a checkpoint keeps them so; a zero or
non-finite gradient at a refresh is an error, not a bad basis for T steps.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from tunesmith.core.part import part
from tunesmith.core.projected import Beta, ProjectedAdamW, Projection


@part(
    paper="arXiv:2403.03507",
    refuses={
        "fsdp": "the singular vectors are of a whole matrix, and a sharded one is not whole on any process",
        "adapters": "the weights under an adapter are frozen, so there is no gradient of theirs to project",
        "prompts": "the weights under a prompt are frozen, so there is no gradient of theirs to project",
    },
)
class GaLore(ProjectedAdamW):
    """AdamW with low-rank moments for matrices.

    A group whose `rank` is None gets plain AdamW, and so does every tensor that is not 2-D; `groups` gives the weights
    of the linear layers in the blocks a rank and everything else none. All options but `per_layer` can be set per
    group.

    Args:
        params: Parameters or groups; `GaLore.groups(model)` makes them.
        lr: Learning rate; that of the projected weights is in effect `lr * scale`.
        weight_decay: Decoupled, after the update.
        rank: r; at most the smaller side of a weight is used.
        period: T, steps of a weight between two projections: 200 in the paper's pre-training, 500 in fine-tuning.
        scale: alpha; 0.25 in pre-training, 4 for fine-tuning at rank 4.
        proj_type: `std` projects the longer side's rows onto the shorter side's basis, `reverse_std` the other way,
            `left`, `right` and `full` (both) whatever the shape. Sides are those of the stored tensor.
        betas: Of Adam.
        eps: Added to the root of the second moment before the bias correction.
        bits: 8 keeps moments of 4096 numbers and more in 8 bits; needs bitsandbytes (`tunesmith[quant]`).
        per_layer: Update inside the backward pass and free each gradient at once.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: PositiveInt = 128,
        period: PositiveInt = 200,
        scale: PositiveFloat = 0.25,
        proj_type: Projection = "std",
        betas: tuple[Beta, Beta] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-6,
        bits: Literal[32, 8] = 32,
        per_layer: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bits=bits,
            per_layer=per_layer,
            rank=rank,
            period=period,
            scale=scale,
            proj_type=proj_type,
        )
        self._tell_of_clipped_ranks()
