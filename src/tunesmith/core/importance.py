"""How much a parameter, a component or a layer matters: the scores that several methods share.

`sensitivity` is first-order; `Smoothed` averages it over steps with its uncertainty (AdaLoRA); `path_attribution`
integrates it between two sets of weights (FAIG, CoLoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tunesmith.core.stats import Loss, model_loss
from tunesmith.errors import TunesmithError


def sensitivity(p: Tensor, gradient: Tensor | None = None) -> Tensor:
    """|w dL/dw| of every entry, in the shape of `p`: how much the loss would change if it were zero.

    Args:
        p: The parameter.
        gradient: Its gradient; `p.grad` if not given.

    Raises:
        TunesmithError: there is no gradient.
    """
    gradient = p.grad if gradient is None else gradient
    if gradient is None:
        raise TunesmithError(
            "a sensitivity needs the gradient of this step: score between the backward pass and zero_grad()"
        )
    return (p.detach() * gradient.detach()).abs()


class Smoothed:
    """Sensitivity averaged over steps, times its own deviation (AdaLoRA, eqs. 9 to 11).

        I_bar <- beta1 I_bar + (1 - beta1) I,   U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|,   s = I_bar U_bar

    Args:
        beta1: Of the mean.
        beta2: Of the deviation.
        uncertainty: Whether the deviation enters the score.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85, uncertainty: bool = True) -> None:
        self.beta1, self.beta2, self.uncertainty = beta1, beta2, uncertainty
        self.mean: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}

    def update(self, name: str, value: Tensor) -> Tensor:
        """Take in a step's sensitivities under a name; returns the scores, in their shape."""
        mean = self.mean.get(name, torch.zeros_like(value))
        deviation = self.deviation.get(name, torch.zeros_like(value))
        mean = self.beta1 * mean + (1 - self.beta1) * value
        deviation = self.beta2 * deviation + (1 - self.beta2) * (value - mean).abs()
        self.mean[name], self.deviation[name] = mean, deviation
        return mean * deviation if self.uncertainty else mean

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        means = {f"mean/{name}": value for name, value in self.mean.items()}
        return means | {f"deviation/{name}": value for name, value in self.deviation.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for key, value in state.items():
            kind, _, name = key.partition("/")
            (self.mean if kind == "mean" else self.deviation)[name] = value.clone()


def path_attribution(
    model: nn.Module,
    start: Mapping[str, Tensor],
    stop: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Any]],
    *,
    loss: Loss = model_loss,
    points: int = 100,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> dict[str, Tensor]:
    """What each entry contributes to the change of the loss on the straight way from `start` to `stop`.

        (stop - start) * (1/M) sum_{m = 0}^{M - 1} dL/dw(start + (m / M) (stop - start))

    Signed: over all entries and parameters the sum approaches L(stop) - L(start) as M grows; the sign of FAIG (Xie et
    al. 2021, eq. 6) is the opposite, and its score the absolute value.

    Args:
        model: Of which `start` and `stop` hold parameters; left as it was. Evaluation mode.
        start: Parameters by name.
        stop: The same names.
        batches: Keyword arguments of the model, or what `loss` takes.
        loss: `(model, batch) -> scalar`; the mean over the batches is attributed.
        points: M.
        progress: Wraps the range of points, such as a progress bar's `track`.

    Returns:
        `{name: tensor in the parameter's shape}`.

    Raises:
        TunesmithError: no batches, or names that differ.
    """
    if not batches:
        raise TunesmithError("an attribution needs at least one batch; none was given")
    if start.keys() != stop.keys():
        raise TunesmithError(f"start and stop name different parameters: {sorted(start.keys() ^ stop.keys())[:3]}")
    totals = {name: torch.zeros_like(value) for name, value in start.items()}
    training = model.training
    model.eval()
    try:
        for m in progress(range(points)):
            here = {
                name: (start[name] + (m / points) * (stop[name] - start[name])).detach().requires_grad_()
                for name in start
            }
            view = _At(model, here)
            for batch in batches:
                gradients = torch.autograd.grad(loss(view, batch), list(here.values()), allow_unused=True)
                for name, gradient in zip(here, gradients, strict=True):
                    if gradient is not None:
                        totals[name] += gradient / (points * len(batches))
    finally:
        model.train(training)
    return {name: (stop[name] - start[name]) * total for name, total in totals.items()}


class _At(nn.Module):
    """A model whose parameters are others, for a loss that calls it."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._model, self._parameters_at = [model], parameters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._model[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model[0], dict(self._parameters_at), args, kwargs)
