"""Polarization: a regulariser that makes all inputs open the same gates, as many as wanted.

Zhi et al., "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training", 2023, for the
gates of `polarization-subnet`:

    R_pol = 1/N sum_n p_n (1 - p_n)                      p_n the mean of gate n over inputs, N gates
    R_act = (sum_n c_n p_n / sum_n c_n - (1 - sparsity))^2            c_n the FLOPs of unit n
    term  = pressure (polarity R_pol + activity R_act)   pressure 0 to 1, from the adapter's `warmup` and `ramp`

The paper does not give R_act, weights and schedule; these are ours. Near p_n = 1 the slope of N R_pol is -1 and that of
N R_act is 2 activity times the excess over the wanted share: gates close while the excess is above 1 / (2 activity),
0.025 here, and then go to the side that they are on. The slope of R_pol is largest at 0 and 1 and zero at 1/2.

p_n is the mean over a batch, as in the paper: not that over inputs. Of one row it is 0 or 1, so that R_pol is 0, and
micro-batches would each be pushed towards their own. With `over="recent"` the value is that of the adapter's p_n, the
mean over recent steps, and the batch gives its slope: dR/dp_n at the recent p_n times the slope of the batch's mean.
Micro-batches, weighted by their labels, and processes then add up. The price is a lag: what is open swings around the
wanted share before it settles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from tunesmith.core.adapter_term import AdapterTerm
from tunesmith.core.loss import model_inputs
from tunesmith.core.objective import Batch
from tunesmith.core.part import part
from tunesmith.core.steps import in_force
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2302.10798",
    tags=("regulariser",),
    refuses={"full-finetuning": "it reads the gates of polarization-subnet, and there is no adapter"},
)
class Polarization(AdapterTerm):
    """Polarisation and activity of gates; logged as `polarization`, `gates_open` and `gates_agree`.

    Its weight, about 1, is given where it is added.

    Args:
        sparsity: Share of the units' FLOPs that is to be closed.
        polarity: Weight of R_pol; 0 leaves it out.
        activity: Weight of R_act.
        over: Inputs that p_n is the mean over: this `batch`, or those of `recent` steps.

    Attributes:
        regularises: The adapter that it is for.
    """

    regularises: ClassVar[str] = "polarization-subnet"
    logged: ClassVar[str] = "polarization"
    lacking: ClassVar[str] = (
        "polarization: no adapter on this model has gates; add `polarization-subnet` to the adapters"
    )

    def __init__(
        self,
        *,
        sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        polarity: NonNegativeFloat = 1.0,
        activity: NonNegativeFloat = 20.0,
        over: Literal["batch", "recent"] = "batch",
    ) -> None:
        self.sparsity, self.polarity, self.activity, self.over = sparsity, polarity, activity, over

    @staticmethod
    def refusals(options: Mapping[str, Any]) -> dict[str, str]:
        """A mean over a part of the batch is not the mean over the batch."""
        if options["over"] == "recent":
            return {}
        return {"gradient-accumulation": "over=batch sees a micro-batch alone; set over to recent"}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Let gates follow the input in the forward pass inside the block, in evaluation too."""
        held: list[Any] = [made for made in in_force(model) if hasattr(made, "polarity")]
        was = [made.by_input for made in held]
        for made in held:
            made.by_input, made.seen = True, None
        try:
            yield
        finally:
            for made, before in zip(held, was, strict=True):
                made.by_input = before

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the term, from the pass that was watched or one of its own.

        Raises:
            ModelError: no adapter has gates, or its blocks ran without gradients.
        """
        held: list[Any] = [made for made in in_force(model) if hasattr(made, "polarity")]
        if any(made.seen is None for made in held):
            with self.watching(model):
                model(**(batch if held[0].shared.both else model_inputs(batch)))
        value, scalars = super().__call__(model, batch, total)
        for made in held:
            made.seen = None  # with its graph
        if held:
            p = torch.cat([made.p for made in held])
            scalars |= {"gates_open": (p > 0.5).float().mean(), "gates_agree": torch.maximum(p, 1 - p).mean()}
        return value, scalars

    def terms(self, model: nn.Module) -> Iterator[Tensor]:
        found = [made.polarity() for made in in_force(model) if hasattr(made, "polarity")]
        if not found:
            return
        means, recent, costs = (torch.cat([row[at] for row in found]) for at in range(3))
        if torch.is_grad_enabled() and not means.requires_grad:
            raise ModelError(
                "polarization: the blocks ran without gradients, as under reentrant gradient checkpointing; set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        p = means if self.over == "batch" else recent + (means - means.detach())
        excess = (costs * p).sum() / costs.sum() - (1 - self.sparsity)
        yield found[0][3] * (self.polarity * (p * (1 - p)).mean() + self.activity * excess.square())
