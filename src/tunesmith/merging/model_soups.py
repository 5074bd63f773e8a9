"""Model soups: average models that were fine-tuned from one start.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", ICML 2022.

    uniform   theta = 1/n sum_i theta_i
    greedy    by falling validation score: S <- S + {i} if score(mean of S + {i}) > score(mean of S)   (Recipe 1)
    learned   min over a, b of  loss(b f(x; sum_i softmax(a)_i theta_i), y) on validation data         (Appendix I)

The paper's Recipe 1 accepts a model at an equal score, its code only at a higher one; so do we. The learned soup needs
the gradient with respect to n weights, not n models: dL/dw_i = <dL/dtheta, theta_i>, so that two models are in memory
whatever n is (the released code holds all n). Its `b` only serves the learning; the soup's logits are not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from tunesmith.core.merging import Judges, LinearMerge, parameters, read, weighted
from tunesmith.core.modelmap import depths
from tunesmith.core.part import part
from tunesmith.core.statedict import Checkpoint, widened
from tunesmith.errors import CheckpointError, RecipeError


@part(paper="arXiv:2203.05482")
class ModelSoups(LinearMerge):
    """Weights for n models that sum to one.

    The validation data of `greedy` and `learned` must not be what the soup is tested on.

    Args:
        kind: `uniform`; `greedy`, which asks a validation score 2n - 1 times; `learned`, which asks a differentiable
            validation loss `steps` times and reads every model twice each time.
        per: Of the learned soup: one set of weights for the `model`, for each `layer` (a block; a module outside of the
            blocks) or for each `tensor`.
        steps: Of AdamW, for the learned soup.
        learning_rate: Of AdamW, for the learned soup.
    """

    def __init__(
        self,
        *,
        kind: Literal["uniform", "greedy", "learned"] = "uniform",
        per: Literal["model", "layer", "tensor"] = "model",
        steps: PositiveInt = 100,
        learning_rate: PositiveFloat = 0.05,
    ) -> None:
        if kind != "learned" and per != "model":
            raise RecipeError(f"model-soups: `per` is {per!r}, which only kind 'learned' has; {kind!r} was asked")
        self.kind, self.per, self.steps, self.learning_rate = kind, per, steps, learning_rate
        self.needs_score, self.needs_loss = kind == "greedy", kind == "learned"
        self._weights: list[list[float]] = []
        self._group: dict[str, int] = {}
        self._record: dict[str, object] = {}

    def prepare(self, base: Checkpoint | None, models: Sequence[Checkpoint], judges: Judges) -> None:
        self._group = dict.fromkeys(models[0], 0)
        self._weights = [[1.0 / len(models)] * len(models)]
        self._record = {"kind": self.kind, "models": [model.name for model in models]}
        if self.kind == "greedy":
            self._choose(models, judges)
        if self.kind == "learned":
            self._learn(models, judges)
        self._record["weights"] = self._weights[0] if self.per == "model" else self._weights

    def coefficients(self, name: str, count: int) -> Sequence[float]:
        return self._weights[self._group[name]]

    def record(self) -> dict[str, object]:
        """`models`, `weights`, and what decided: `scores` and `kept`, or `losses` and `temperature`."""
        return self._record

    def _choose(self, models: Sequence[Checkpoint], judges: Judges) -> None:
        scores = [self._score([i], models, judges) for i in range(len(models))]
        order = sorted(range(len(models)), key=lambda i: -scores[i])
        kept, best = order[:1], scores[order[0]]
        for i in order[1:]:
            if (found := self._score([*kept, i], models, judges)) > best:
                kept, best = [*kept, i], found
        self._weights = [_even(kept, len(models))]
        self._record |= {"scores": scores, "score": best, "kept": sorted(kept)}

    def _score(self, chosen: list[int], models: Sequence[Checkpoint], judges: Judges) -> float:
        assert judges.score is not None
        weights = _even(chosen, len(models))
        found = float(judges.score(weighted(models, lambda _: weights)))
        if math.isnan(found):
            raise CheckpointError(f"model-soups: the score of {', '.join(models[i].name for i in chosen)} is no number")
        return found

    def _learn(self, models: Sequence[Checkpoint], judges: Judges) -> None:
        names = list(parameters(models[0]))
        labels = self._labels(names)
        self._group = {name: labels.get(name, 0) for name in models[0]}
        raw = torch.zeros(max(labels.values()) + 1, len(models), dtype=torch.float64, requires_grad=True)
        log_scale = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.AdamW([raw, log_scale], lr=self.learning_rate, weight_decay=0.0)
        losses = []
        for _ in range(self.steps):
            weights = raw.softmax(1)
            loss, toward, scale_gradient = self._gradient(weights.detach(), log_scale, names, models, judges)
            losses.append(loss)
            optimizer.zero_grad()
            weights.backward(toward)
            log_scale.grad = scale_gradient
            optimizer.step()
        self._weights = raw.softmax(1).tolist()
        self._record |= {"losses": losses, "temperature": math.exp(-log_scale.item())}
        if self.per != "model":
            self._record["groups"] = dict(labels)

    def _gradient(
        self, weights: Tensor, log_scale: Tensor, names: list[str], models: Sequence[Checkpoint], judges: Judges
    ) -> tuple[float, Tensor, Tensor]:
        """The loss, and its gradients with respect to the weights, (groups, n), and to `log_scale`."""
        assert judges.loss is not None
        rows = weights.tolist()
        candidate = weighted(models, lambda name: rows[self._group[name]])
        state = {name: candidate.wide(name) for name in candidate}
        for name in names:
            state[name] = state[name].to(widened(candidate.describe(name)[1])).requires_grad_()
        leaves = [state[name] for name in names]
        with torch.enable_grad():
            loss = judges.loss(state, log_scale.exp())
            if loss.dim() or not bool(loss.isfinite()):
                raise CheckpointError(f"model-soups: the validation loss must be a finite scalar, found {loss}")
            gradients = torch.autograd.grad(loss, [*leaves, log_scale], allow_unused=True)
        toward = torch.zeros_like(weights)
        for name, gradient in zip(names, gradients, strict=False):
            if gradient is not None:
                for i, model in enumerate(models):
                    toward[self._group[name], i] += (gradient.double() * read(model, name)).sum()
        return float(loss.detach()), toward, torch.zeros(()) if gradients[-1] is None else gradients[-1]

    def _labels(self, names: list[str]) -> dict[str, int]:
        """`{name: number of its group}`."""
        place = depths(names)
        keys = {}
        for name in names:
            depth = place[name]
            layer = f"{depth.stack}.{depth.index}" if depth else name.rpartition(".")[0]
            keys[name] = {"model": "", "layer": layer, "tensor": name}[self.per]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys.values()))}
        return {name: numbers[key] for name, key in keys.items()}


def _even(chosen: Sequence[int], count: int) -> list[float]:
    return [1.0 / len(chosen) if i in chosen else 0.0 for i in range(count)]
