"""LiNeS: scale what fine-tuning changed linearly with depth, so that early layers stay near the base.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025.

    theta_l = theta0_l + lambda_l (theta_l - theta0_l),   lambda_l = alpha + beta l / (L - 1)   for block l of L
    lambda = alpha                                         outside of the blocks (embeddings, final norm, head)
    single-task   alpha = gamma, beta = 1 - gamma          the last block keeps its whole change
    multi-task    alpha = ||sum_t tau_t||_1 / ||tau_MTL||_1 / n,   tau = theta - theta0, over n task models

The depth of a tensor is the number of its block in its stack (`core/modelmap.py`), for each stack of an encoder-decoder
on its own. The released code takes the smallest number that stands anywhere in the name: `blocks.7.mlp.0.weight` is to
it of block 0. It also divides by zero where L = 1; here a single block counts as the last one.

A LoRA is scaled through its product, once per module (`core.lora_folder.merge_adapters`), not through both factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from tunesmith.core.merging import Judges, LinearMerge, parameters, read, weighted
from tunesmith.core.modelmap import Depth, depths
from tunesmith.core.part import part
from tunesmith.core.statedict import Checkpoint
from tunesmith.errors import CheckpointError, RecipeError

_GRID = [step / 10 for step in range(11)]


@part(paper="arXiv:2410.17146")
class Lines(LinearMerge):
    """Scales the change of the FIRST model by depth.

    Give one fine-tuned model for the single-task form. Give the result of another merge, then the task models that it
    was made of, for the multi-task form: `[merged(soup, tasks), *tasks]`; only its norms are taken from the tasks.

    Args:
        form: `single-task` or `multi-task`.
        gamma: Of the single-task form: the scale at the first block. Without one, the best of 1, 0.9, ..., 0 by the
            validation score (the paper's: twice the target accuracy plus the control accuracy).
        alpha: Of the multi-task form: the scale at the first block. Without one, by the norms above.
        beta: Of the multi-task form: what the last block gets on top. Without one, the best of 0.1, 0.2, ..., 1 by
            the validation score.
    """

    needs_base = True
    ordered = True

    def __init__(
        self,
        *,
        form: Literal["single-task", "multi-task"] = "single-task",
        gamma: Annotated[float, Field(ge=0, le=1)] | None = None,
        alpha: NonNegativeFloat | None = None,
        beta: NonNegativeFloat | None = None,
    ) -> None:
        if form == "single-task" and (alpha is not None or beta is not None):
            raise RecipeError(
                "lines: `alpha` and `beta` belong to the multi-task form; the single-task form has `gamma`"
            )
        if form == "multi-task" and gamma is not None:
            raise RecipeError(
                "lines: `gamma` belongs to the single-task form; the multi-task form has `alpha` and `beta`"
            )
        self.form, self.gamma, self.alpha, self.beta = form, gamma, alpha, beta
        self.takes_one = form == "single-task"
        self.needs_score = (gamma if form == "single-task" else beta) is None
        self._depths: dict[str, Depth | None] = {}
        self._scale = (1.0, 0.0)
        self._record: dict[str, object] = {}

    def prepare(self, base: Checkpoint | None, models: Sequence[Checkpoint], judges: Judges) -> None:
        assert base is not None
        self._depths = depths(base)
        if not any(self._depths.values()):
            raise CheckpointError(
                f"lines: {base.name} has no numbered blocks (such as `model.layers.0`), by which to tell the depth"
            )
        if self.form == "single-task":
            self._scale = self._best(lambda g: (g, 1 - g), self.gamma, _GRID[::-1], base, models, judges)
        else:
            alpha = self._alpha(base, models) if self.alpha is None else self.alpha
            self._scale = self._best(lambda b: (alpha, b), self.beta, _GRID[1:], base, models, judges)
        self._record |= {"form": self.form, "alpha": self._scale[0], "beta": self._scale[1]}

    def coefficients(self, name: str, count: int) -> Sequence[float]:
        return [self.scale(name), *[0.0] * (count - 1)]

    def scale(self, name: str) -> float:
        """lambda for a tensor, after `prepare`."""
        (alpha, beta), depth = self._scale, self._depths[name]
        if depth is None:
            return alpha
        return alpha + beta * (depth.index / (depth.count - 1) if depth.count > 1 else 1.0)

    def record(self) -> dict[str, object]:
        """`alpha`, `beta`, and the `scores` of the grid where one was searched."""
        return self._record

    def _best(
        self,
        scale: Callable[[float], tuple[float, float]],
        given: float | None,
        grid: Sequence[float],
        base: Checkpoint,
        models: Sequence[Checkpoint],
        judges: Judges,
    ) -> tuple[float, float]:
        if given is not None:
            return scale(given)
        assert judges.score is not None
        scores = {}
        for value in grid:
            self._scale = scale(value)
            candidate = weighted(models, lambda name: self.coefficients(name, len(models)), base)
            scores[value] = float(judges.score(candidate))
        self._record["scores"] = {str(value): score for value, score in scores.items()}
        return scale(max(scores, key=lambda value: scores[value]))

    def _alpha(self, base: Checkpoint, models: Sequence[Checkpoint]) -> float:
        tasks = len(models) - 1
        if not tasks:
            raise CheckpointError(
                "lines: the multi-task form takes alpha from the norms of the task models; give them after the merged "
                "model, or set `alpha`"
            )
        summed = changed = 0.0
        for name in parameters(base):
            origin = read(base, name).double()
            changed += (read(models[0], name) - origin).abs().sum().item()
            total = -tasks * origin
            for task in models[1:]:
                total += read(task, name)
            summed += total.abs().sum().item()
        if not changed:
            raise CheckpointError(
                f"lines: {models[0].name} does not differ from {base.name}; there is nothing to scale"
            )
        return summed / changed / tasks
