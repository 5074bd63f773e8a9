"""SSF: learn a scale and a shift after every operation, and fold them into it.

Lian, Zhou, Feng and Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022.

    y = gamma * f(x) + beta         per output channel, after each linear, convolution and normalisation f   (eq. 3)
    W' = diag(gamma) W,  b' = gamma * b + beta                                                               (eq. 5)

Where we go beyond the paper's ViT: a normalisation without a bias (RMSNorm) gets the scale alone, since the shift of
the linear layers that read it already spans what its own shift could do; and `shift=False` leaves every shift out, for
architectures whose checkpoints have no place for the biases that merging would create.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below
from tunesmith.core.layer import LayerSpec, kind_of
from tunesmith.core.modelmap import block_linears, roles
from tunesmith.core.part import part


@part(paper="arXiv:2210.08823", tags=("mergeable",))
class SSF(Adapter):
    """Scale and shift of a layer's output channels.

    Args:
        layer: A linear, convolution or normalisation layer.
        std: Standard deviation of the start, gamma ~ N(1, std^2) and beta ~ N(0, std^2); 0 starts at the base model.
        shift: Whether beta exists. False leaves checkpoints without biases loadable after merging.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "norm"})
    neutral: ClassVar[Mapping[str, object]] = {"std": 0.0}

    def __init__(self, layer: LayerSpec, *, std: NonNegativeFloat = 0.02, shift: bool = True) -> None:
        super().__init__(layer)
        channels = layer.out_features
        self.scale = nn.Parameter(1 + std * torch.randn(channels, device=layer.device))
        has_shift = shift and layer.can_bias
        self.shift = nn.Parameter(std * torch.randn(channels, device=layer.device)) if has_shift else None

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Linear and normalisation layers of the blocks, the patch embedding's convolution, the final norm (Fig. 2)."""
        known = roles(model)
        inside = set(block_linears(model))
        for name, module in model.named_modules():
            kind = kind_of(module)
            role = known.get(f"{name}.weight")
            if kind in ("norm", "conv") and role is not None and role.kind != "head" and "tunesmith_" not in name:
                inside.add(name.removesuffix(".base_layer"))
        return sorted(inside)

    def weight(self, W: Tensor) -> Tensor:
        return W * self.scale.to(W.dtype).view(-1, *[1] * (W.dim() - 1))

    def bias(self, b: Tensor | None) -> Tensor | None:
        scaled = None if b is None else b * self.scale.to(b.dtype)
        if self.shift is None:
            return scaled
        return self.shift if scaled is None else scaled + self.shift.to(scaled.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        y = below(x)
        around = [1] * y.dim()
        around[self.layer.channel_dim] = -1
        y = y * self.scale.to(y.dtype).view(around)
        return y if self.shift is None else y + self.shift.to(y.dtype).view(around)
