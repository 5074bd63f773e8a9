"""Mask tuning (R-AMT): the frozen weights of attention, some of them switched off by binary masks that are learned.

Zheng, Wu, Zheng, Yang, Hu, Wang and Wu, "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained
Vision-Language Models", ICCV 2023 (section 3.2).

    W' = 1[M > threshold] * W,     dL/dM = dL/dW' * W   (straight through the step)

A score M per weight, `start` everywhere: nothing is masked at the beginning, and a score has to fall by
start - threshold before its weight goes, which takes about (start - threshold) / lr steps of Adam. Biases are not
masked. The gradient-dropout regularity of the paper is the objective `gradient-dropout`.

Scores are float32 whatever the weights are: the gap of 5e-3 that they have to cross is near the resolution of half
precision. A trained mask is one bit per weight (`packed`), or a delta that takes the masked weights away.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import block_linears, roles
from tunesmith.core.part import part
from tunesmith.core.rebuilt import RebuiltAdapter
from tunesmith.errors import ModelError, RecipeError

_ATTENTION = frozenset({"q", "k", "v", "qkv", "o"})


@part(
    paper="arXiv:2307.15049",
    tags=("mergeable", "sparse"),
    implies={"train.weight_decay": 0.0},
)
class MaskTuning(RebuiltAdapter):
    """A binary mask on a layer's weight.

    Weight decay must be 0 (a recipe sees to it): it would pull every score below the threshold.

    Args:
        layer: A linear or convolution layer, also quantised.
        start: Score of every weight at the beginning.
        threshold: A weight stays while its score is above it.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})

    def __init__(self, layer: LayerSpec, *, start: float = 1e-2, threshold: float = 5e-3) -> None:
        if not start > threshold:
            raise RecipeError(f"mask-tuning: start={start:g} must be above threshold={threshold:g}: all is masked else")
        super().__init__(layer)
        self.threshold = threshold
        self.scores = nn.Parameter(torch.full(layer.shape, start, device=layer.device))

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """The linear layers of attention (section 4.1); name others in `target_modules`.

        Raises:
            ModelError: no layer of attention is known by its name.
        """
        known = roles(model)
        found = [
            name
            for name in block_linears(model)
            if any(
                known[key].kind in _ATTENTION for key in (f"{name}.weight", f"{name}.base_layer.weight") if key in known
            )
        ]
        if not found:
            raise ModelError(
                f"mask-tuning masks the layers of attention, and none of {type(model).__name__} is known by its name; "
                "give `target_modules`"
            )
        return found

    @property
    def kept(self) -> Tensor:
        """Where the weight stays, bool in the canonical shape."""
        return self.scores > self.threshold

    def weight(self, W: Tensor) -> Tensor:
        return _Step.apply(self.scores, self.threshold).to(W.dtype) * W

    def sparse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        places = (~self.kept).flatten().nonzero()[:, 0]
        return places, -W.detach().reshape(-1)[places]

    def packed(self) -> Tensor:
        """The mask in bits, eight weights to a byte, the first in the highest bit: (ceil(n / 8),) uint8."""
        flat = self.kept.flatten().to(torch.uint8)
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
        powers = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=flat.device)
        return (flat * powers).sum(1).to(torch.uint8)


class _Step(torch.autograd.Function):
    """1 where a score is above the threshold, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def masked_share(model: nn.Module) -> float:
    """The share of the weights under masks that is switched off, 0 to 1.

    Raises:
        ModelError: the model has no masks.
    """
    masks = [made for made in model.modules() if isinstance(made, MaskTuning)]
    if not masks:
        raise ModelError(f"{type(model).__name__} has no masks of mask-tuning")
    off = sum(int((~made.kept).sum()) for made in masks)
    return off / sum(made.scores.numel() for made in masks)


def unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `MaskTuning.packed` packed, bool of `shape`."""
    bits = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    flat = (packed[:, None] & bits).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)
