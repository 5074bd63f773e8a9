"""CorDA: start A and B from singular directions of the weight that are oriented by the layer's inputs.

Yang, Li, Zhou, Song, Wu, Nie and Ghanem, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024.

    C = mean over rows of X^T X, X the (tokens, in) inputs over |max X|,   C~ = C + d mean(diag C) I         (Section 3)
    W C~ = U S V^T,   V^ = C~^-1 V,   so that W = U S V^^T
    B0 = U_r S_r^(1/2) / s^(1/2),   A0 = S_r^(1/2) V^_r^T / s^(1/2),   W' = W + s (B A - B0 A0),   s = alpha / r

with the r largest components in the instruction-previewed mode, the r smallest in the knowledge-preserved one. d is
doubled until |C~ C~^-1 - I|_F < 0.05. All of it is computed in float64, where the first d does; the released code and
PEFT invert in float32, where rounding can raise d on wide layers (to 0.02 at 2048 inputs whose variances fall as i^-2).

The paper subtracts s B0 A0 from the frozen weight. Here it stays beside A and B: the base is not modified, what is
saved fits the original checkpoint, and the exported LoRA has rank 2r.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.adapter import Statistics
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import OffsetLowRank, with_signs
from tunesmith.core.part import part
from tunesmith.errors import ModelError

TOLERANCE = 0.05
"""Of the inverse, as in the released code."""


@part(
    paper="arXiv:2406.05223",
    tags=("mergeable", "low-rank", "needs-statistics"),
    refuses={"padding-free": "its statistics are a mean over rows, each over its own maximum"},
)
class CorDA(OffsetLowRank):
    """A LoRA that starts along the weight's components that matter most, or least, for some inputs.

    Args:
        layer: A linear layer.
        rank: r.
        alpha: Scale; the start is the same whatever it is. None takes r (s = 1), as in the paper.
        dropout: On the input of A while training.
        mode: `ipm` trains the r components that matter most for the batches given (those of the task to learn);
            `kpm` the r that matter least (give batches of what is to be kept).
        damping: d at the start.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    statistics: ClassVar[tuple[str, ...]] = ("input_gram",)

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat | None = None,
        dropout: NonNegativeFloat = 0.0,
        mode: Literal["ipm", "kpm"] = "ipm",
        damping: PositiveFloat = 0.01,
    ) -> None:
        super().__init__(layer, rank, dropout)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.mode, self.damping = mode, damping

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        try:
            U, S, Vh = decompose(W, statistics["input_gram"], self.damping)
        except ModelError as error:
            raise ModelError(f"CorDA on {self.layer.name!r}: {error}") from None
        first = 0 if self.mode == "ipm" else len(S) - self.rank
        chosen = slice(first, first + self.rank)
        # Both factors of a component without size would be zero, and then neither ever gets a gradient.
        if not S[chosen][-1] > S[0] * max(W.shape) * torch.finfo(S.dtype).eps:
            raise ModelError(
                f"CorDA on {self.layer.name!r}: some of the {self.rank} components to train are zero, since the weight "
                f"has a lower rank than {len(S)}. Lower `rank`, take the other `mode`, or leave the layer out."
            )
        U, V = with_signs(U[:, chosen], Vh[chosen].T)
        root = (S[chosen] / self.scaling).sqrt()
        self.start(U * root, (V * root).T)


def decompose(W: Tensor, gram: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) with W = U diag(S) Vh, the components in the order of what they do to inputs like those seen.

    Args:
        W: (out, in).
        gram: C, (in, in): the statistic `input_gram`, or another second moment of the inputs. Its scale is that of S.
        damping: d at the start.

    Returns:
        (out, k), (k,) and (k, in), k = min(out, in), float64. The rows of Vh are not orthogonal; those of Vh C~ are.

    Raises:
        ModelError: the inputs were all zero, or not finite.
    """
    damped, inverse = _damped(gram.double(), damping)
    U, S, Vh = torch.linalg.svd(W.double() @ damped, full_matrices=False)
    return U, S, Vh @ inverse


def truncated(W: Tensor, gram: Tensor, discard: int, damping: float = 0.01) -> Tensor:
    """W without its `discard` smallest components: the paper's study of what they hold (Section 3).

    No matrix of that rank has a smaller |(W - W^) C~|_F.
    """
    U, S, Vh = decompose(W, gram, damping)
    kept = len(S) - discard
    return ((U[:, :kept] * S[:kept]) @ Vh[:kept]).to(W.dtype)


def _damped(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(C~, C~^-1)."""
    size, eye = C.diagonal().mean(), torch.eye(len(C), dtype=C.dtype, device=C.device)
    if not bool(C.isfinite().all()) or not size > 0:
        raise ModelError("the inputs in the batches given are all zero, or not finite")
    while True:
        damped = C + damping * size * eye
        inverse = torch.linalg.inv_ex(damped).inverse
        if torch.dist(damped @ inverse, eye) < TOLERANCE:
            return damped, inverse
        damping *= 2
