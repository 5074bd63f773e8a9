"""CoLoRA: rank where a layer contributes to what a task asks for, on convolutions and linear layers.

Park, Kim and Chun, "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration", ECCV
2024. Contributions are the filter attributions (FAIG) of Xie, Wang, Dong, Qi and Shan, NeurIPS 2021, eq. 6.

    F   = |(theta0 - theta1) (1/M) sum_{m < M} dL/dtheta(theta1 + (m/M) (theta0 - theta1))|,  M = 100
    c_i = mean over the layer's filters of the sum of F inside each, divided by its sum over all layers
    W'  = W + s B A,  the kernel flattened into its inputs: A is (r_i, in k^2), B is (out, r_i)

theta0 are the pretrained weights, theta1 those fully tuned on a little data of the task: `contributions`, then
`rank_table`, and the table goes to the adapter as `ranks`. Without such a reference F is |dL/dtheta| at theta0, one
pass over a few batches (`tunesmith.initialise`).

    r_i = max(1, round(gamma max(c_i^beta n / sum_j c_j^beta, least) min(out, in k^2))), at most min(out, in k^2)

The paper's own rule from contributions to ranks was not to be found; this one is ours. gamma is the largest that keeps
the adapter within the budget; what rounding leaves of it goes, a rank at most to each, to the layers that would be
rounded up next. The smallest share is relative to the mean layer's: a fixed 5 % of full rank costs 10 % of a square
linear layer and 5.6 % of a square 3 x 3 convolution, more than the budget of 7 % or most of it.

A filter is a row of the canonical weight: an output feature, an output channel, of a grouped convolution with the
inputs of its group only. All groups share A then, so that a depthwise layer of c channels costs c + k^2 per rank; an A
for each would cost more than the weight. s is the same in all layers, so that more rank is no smaller step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.core.adapter import Statistics
from tunesmith.core.importance import path_attribution
from tunesmith.core.layer import LayerSpec, describe, kind_of
from tunesmith.core.lowrank import LowRank, matrix_shape
from tunesmith.core.modelmap import block_linears
from tunesmith.core.part import part
from tunesmith.core.ranks import RankTable, proportional
from tunesmith.core.stats import Loss, model_loss
from tunesmith.errors import ModelError, RecipeError


@part(paper="arXiv:2408.01099", tags=("mergeable", "low-rank", "needs-statistics"))
class CoLoRA(LowRank):
    """A LoRA whose rank follows how much each layer contributes to the task.

    Args:
        layer: A linear or convolution layer.
        rank: Of every layer that no table of ranks names; None shares the budget out when `tunesmith.initialise` sees
            the data.
        budget: Parameters of all adapters over those of the weights that they change.
        beta: Exponent of the contributions; 0 gives every layer the same share of its full rank.
        least: The smallest share of a layer, in units of the mean layer's.
        scale: s.
        dropout: On the input of A while training.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    statistics: ClassVar[tuple[str, ...]] = ("gradient",)
    prepared: Tensor

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt | None = None,
        budget: Annotated[float, Field(gt=0, le=1)] = 0.07,
        beta: NonNegativeFloat = 1.0,
        least: Annotated[float, Field(ge=0, le=1)] = 0.05,
        scale: PositiveFloat = 1.0,
        dropout: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(layer, rank or 1, dropout)
        self.budget, self.beta, self.least, self.scale = budget, beta, least, scale
        self.prepared.fill_(rank is not None)
        self._score = 0.0

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every convolution, and the linear layers inside the blocks; all where the last layer is a convolution: such
        a network puts out images, and its last linear layer is no head."""
        kinds = {
            name.removesuffix(".base_layer"): kind
            for name, module in model.named_modules()
            if "tunesmith_" not in name and (kind := kind_of(module)) in cls.kinds
        }
        inside = set(kinds if [*kinds.values()][-1:] == ["conv"] else block_linears(model))
        return [name for name, kind in kinds.items() if kind == "conv" or name in inside]

    def prepare(self, W: Tensor, statistics: Statistics) -> None:
        self._score = _contribution(statistics["gradient"])
        if not math.isfinite(self._score):
            raise ModelError(f"CoLoRA: the gradient of {self.layer.name!r} is not finite; look at the batches given")

    @classmethod
    def arrange(cls, adapters: Sequence[Self]) -> None:
        specs, scores = [made.layer for made in adapters], {made.layer.name: made._score for made in adapters}
        if not any(scores.values()):
            raise ModelError("CoLoRA: the gradient of every layer is zero; look at the batches given")
        first = adapters[0]
        ranks = _share(specs, scores, first.budget, first.beta, first.least)
        for made in adapters:
            if made.rank != ranks[made.layer.name]:
                device = made.A.device  # the model may have moved since the layer was described
                made.resize(ranks[made.layer.name])
                made.to(device)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.scale


def contributions(
    model: nn.Module,
    tuned_state: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Any]],
    loss: Loss = model_loss,
    points: int = 100,
    *,
    layers: Sequence[str] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> dict[str, float]:
    """c_i of each layer, by the attributions between the model's weights and those of the same model tuned.

    Every parameter moves along the way; only the weights of `layers` are scored.

    Args:
        model: With the pretrained weights theta0, and the buffers that hold for both; without adapters. Left as it was.
        tuned_state: theta1, by the names of the model's state dict; what it leaves out is taken as not tuned.
        batches: Of the task.
        loss: `(model, batch) -> scalar`; FAIG's is the sum of squared errors. Its scale does not matter.
        points: M; that many passes over the batches, forward and backward.
        layers: Names of the layers to score; those that the adapter changes by default if not given.
        progress: Wraps the range of points, such as a progress bar's `track`.

    Returns:
        Shares that sum to 1, in the order of the model.

    Raises:
        ModelError: a name that the model has not, a tensor of another shape, weights that are codes, or no change of
            any scored layer that the loss would notice.
    """
    names = CoLoRA.targets(model) if layers is None else list(layers)
    modules = {name: model.get_submodule(name) for name in names}
    specs = {name: describe(module, name) for name, module in modules.items()}
    if codes := [name for name, spec in specs.items() if spec.quantized]:
        raise ModelError(f"contributions need the weights themselves; {codes[0]!r} holds codes: load it in float32")
    known = model.state_dict()
    if strange := [name for name in tuned_state if name not in known]:
        raise ModelError(
            f"tuned_state names {strange[0]!r}, which {type(model).__name__} has not; it has {[*known][:3]}"
        )
    for name, value in tuned_state.items():
        if value.shape != known[name].shape:
            raise ModelError(
                f"tuned_state: {name!r} is {tuple(value.shape)}; the model's is {tuple(known[name].shape)}"
            )
    pretrained = {name: p.detach() for name, p in model.named_parameters()}
    tuned = {name: tuned_state.get(name, p).detach().to(p) for name, p in pretrained.items()}
    found = path_attribution(model, tuned, pretrained, batches, loss=loss, points=points, progress=progress)
    place = {id(p): name for name, p in model.named_parameters()}
    scores = {}
    for name, module in modules.items():
        attributed = found[place[id(module.weight)]]
        scores[name] = _contribution(attributed.T if isinstance(module, Conv1D) else attributed)
    total = sum(scores.values())
    if not 0 < total < math.inf:
        raise ModelError(f"the contributions of the layers sum to {total}: is tuned_state the tuned model, and finite?")
    return {name: score / total for name, score in scores.items()}


def rank_table(
    model: nn.Module, scores: Mapping[str, float], budget: float = 0.07, beta: float = 1.0, least: float = 0.05
) -> RankTable:
    """Ranks by contributions, for `tunesmith.adapter(..., ranks=table)`; arguments as `contributions` and `CoLoRA`.

    Raises:
        RecipeError: the budget does not pay for rank 1 everywhere, or scores that are negative, not finite or all zero.
        ModelError: a name that is no layer which can have a rank.
    """
    specs = [describe(model.get_submodule(name), name) for name in scores]
    if wrong := [spec for spec in specs if spec.kind not in CoLoRA.kinds]:
        raise ModelError(f"{wrong[0].name!r} is a {wrong[0].kind} layer; CoLoRA changes convolutions and linear layers")
    source = f"contributions, {100 * budget:g} % of the parameters"
    return RankTable(_share(specs, scores, budget, beta, least), scores, source)


def _share(
    specs: Sequence[LayerSpec], scores: Mapping[str, float], budget: float, beta: float, least: float
) -> dict[str, int]:
    """Ranks as in the file's docstring."""
    if not all(0 <= c < math.inf for c in scores.values()) or not any(scores.values()):
        raise RecipeError("colora: contributions must be finite, not negative and not all zero")
    limits = {spec.name: min(matrix_shape(spec)) for spec in specs}
    costs = {spec.name: sum(matrix_shape(spec)) for spec in specs}
    allowed = int(budget * sum(math.prod(spec.shape) for spec in specs))
    most = max(scores.values())
    powers = {name: (c / most) ** beta for name, c in scores.items()}
    mean = sum(powers.values()) / len(powers)
    weights = {name: max(power / mean, least) * limits[name] for name, power in powers.items()}
    ranks = proportional(weights, costs, limits, allowed)
    # Layers of one weight are rounded up together, or not at all: what that leaves is spent one by one.
    left = allowed - sum(costs[name] * rank for name, rank in ranks.items())
    for name in sorted(filter(weights.get, ranks), key=lambda name: (ranks[name] + 0.5) / weights[name]):
        if ranks[name] < limits[name] and costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _contribution(values: Tensor) -> float:
    """The mean over filters of the sum of |values| inside each."""
    return float(values.detach().abs().flatten(1).sum(1, dtype=torch.float64).mean())
