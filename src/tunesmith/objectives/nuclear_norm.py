"""Nuclear norm: a regulariser that keeps the trained entries of a layer, as a matrix, of low rank.

Section "nuclear-norm-based low-rank sparse training" of Hu et al., "SaRA", ICLR 2025, with the weight 5e-4 in the
released settings.

    |P|_* = sum of the singular values of P = W' * M,      d|P|_* / dP = U V^T,   of which M's entries reach v

of ONE layer per optimizer step, drawn from the step's number: the same in all its micro-batches and processes, and in a
resumed run. Layers are drawn whose smaller side is above 64; a model without any such draws from all its matrices. A
singular value of 0 has no slope here (U and V of the others are taken), where a full decomposition gives it an
arbitrary one.

It does not depend on the data: a micro-batch contributes it in proportion to its labels, so that a step has it once. In
released code the gradient goes to tensors that no one reads: there the term has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from tunesmith.core.adapter_term import AdapterTerm
from tunesmith.core.part import part
from tunesmith.core.seeds import integer
from tunesmith.core.steps import in_force
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2409.06633",
    tags=("regulariser",),
    refuses={"full-finetuning": "it is of the entries that sara trains, and there is no adapter"},
)
class NuclearNorm(AdapterTerm):
    """The nuclear norm of the trained entries of one layer per step; logged as `nuclear_norm`.

    Its weight, 5e-4 in the paper, is given where it is added.

    Args:
        min_side: Layers are drawn whose smaller side is above this; all matrices where no layer's is.
        convolutions: Whether convolutions count too, as matrices (out, in * kernel); the paper has matrices alone.
        seed: Of the draws.

    Attributes:
        regularises: The adapter that it is for.
    """

    regularises: ClassVar[str] = "sara"
    logged: ClassVar[str] = "nuclear_norm"
    lacking: ClassVar[str] = (
        "nuclear-norm: no adapter on this model offers its trained entries as a matrix; add `sara` to the adapters"
    )

    def __init__(self, *, min_side: NonNegativeInt = 64, convolutions: bool = False, seed: int = 0) -> None:
        self.min_side, self.convolutions, self.seed = min_side, convolutions, seed

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        """The term of this step's layer, (), differentiable.

        Raises:
            ModelError: all layers are convolutions, and those do not count.
        """
        offered: list[Any] = [made for made in in_force(model) if hasattr(made, "trained_matrix")]
        found = [made for made in offered if len(made.layer.shape) == 2 or self.convolutions]
        if offered and not found:
            raise ModelError(
                f"nuclear-norm: all {len(offered)} layers are convolutions, such as {offered[0].layer.name!r}; set "
                "`convolutions`, or change linear layers too"
            )
        wide = [made for made in found if min(_sides(made.layer.shape)) > self.min_side] or found
        if wide:
            step = wide[0].at_step
            made = wide[integer(0, len(wide) - 1, self.seed, "nuclear-norm", step)]
            yield nuclear_norm(made.trained_matrix().flatten(1))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def nuclear_norm(P: Tensor) -> Tensor:
    """The sum of the singular values of a matrix, (); its gradient is U V^T of those that are not 0."""
    with torch.no_grad(), torch.autocast(P.device.type, enabled=False):
        U, S, Vh = torch.linalg.svd(P, full_matrices=False)
        held = S.amax() * max(P.shape) * torch.finfo(S.dtype).eps < S
        slope = U[:, held] @ Vh[held]
    return (slope * (P - P.detach())).sum() + S.sum()
