"""The units of `polarization-subnet`: which heads and neurons a model can lose, and what their gates share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import depths
from tunesmith.core.surgery import Site, Structure, cut, sites
from tunesmith.errors import ModelError

REACH = 4.0
"""|a| beyond which the slope of sigma is that at it, 0.018."""


class Gates(torch.autograd.Function):
    """1[a > 0], and 1 for the `least` largest a, (..., units); backward by the slope of sigma."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, least: int) -> Tensor:
        ctx.save_for_backward(a)
        return ((a > 0) | (a >= a.topk(least, -1).values[..., -1:])).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        s = torch.sigmoid(a.clamp(-REACH, REACH))
        return grad * s * (1 - s), None


class Plan(nn.Module):
    """What the gated layers share: nothing that trains or is saved.

    Args:
        found: Units by the layer that reads them.
        specs: Of these layers and of those that make the units.
        causal: Whether a token of the layer's block sees no later one.
        both: Whether the model is an encoder-decoder, whose decoder has a mask of its own.

    Attributes:
        pressure: Of the regulariser in this step, 0 to 1.
        masks: Of the running forward pass, (B, T) bool each, by the name of the keyword.
    """

    def __init__(
        self, found: Mapping[str, Site], specs: Mapping[str, LayerSpec], causal: Mapping[str, bool], both: bool
    ) -> None:
        super().__init__()
        self.sites, self.specs, self.causal, self.both = dict(found), dict(specs), dict(causal), both
        self.pressure, self.masks = 1.0, dict[str, Tensor]()

    def note(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Keep the masks of a forward pass; a hook of the model."""
        named = {name: kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        self.masks = {name: m.bool() for name, m in named.items() if m is not None and m.dim() == 2}

    def real(self, name: str, h: Tensor) -> Tensor:
        """The tokens of h (..., tokens, d) that are no padding, as far as a mask says; virtual tokens count.

        Args:
            name: Of the layer.
            h: What its part reads.
        """
        words, shape = name.split("."), h.shape[:-1]
        mask = self.masks.get("decoder_attention_mask" if "decoder" in words and self.both else "attention_mask")
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=h.device)
        if len(shape) == 2 and len(mask) == shape[0] and mask.shape[1] < shape[1]:
            mask = torch.cat([mask.new_ones(len(mask), shape[1] - mask.shape[1]), mask], 1)
        fits = mask.numel() == shape.numel()
        return mask.reshape(shape) if fits else torch.ones(shape, dtype=torch.bool, device=h.device)


def cuttable(model: nn.Module) -> tuple[dict[str, Site], dict[str, str]]:
    """The units that `core.surgery` can take out, by the layer that reads them; and why not, for the other layers."""
    found, reasons = sites(model), dict[str, str]()
    if not isinstance(model, PreTrainedModel):
        return found, reasons
    with torch.device("meta"):
        bare = type(model)(model.config)  # the same architecture without weights, to try on
    whole = sites(bare)
    for name in list(found):
        site = whole[name]
        kept = range(site.count - site.share or site.count)
        try:
            cut(bare, Structure(*({name: kept} if site.kind == kind else {} for kind in ("heads", "neurons"))))
        except ModelError as error:
            reasons[name] = str(error)
            del found[name]
    return found, reasons


def is_causal(model: nn.Module, name: str) -> bool:
    """Whether the attention of a layer's block lets no token see a later one."""
    place = depths([*(n for n, _ in model.named_parameters()), f"{name}.weight"])[f"{name}.weight"]
    block = model.get_submodule(f"{place.stack}.{place.index}") if place else model
    return any(getattr(m, "is_causal", False) is True for m in block.modules())
