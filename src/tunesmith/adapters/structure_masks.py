"""Structure masks: one learned factor per attention head and per feed-forward neuron.

Gu, Fu, Liu, Shen, Lin, Wang, Hu and Wang, "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning",
Findings of ACL 2024 (section 3.2).

    attention:     y = sum_h m_h softmax(Q_h K_h^T / sqrt d) V_h W_O,h
    feed-forward:  y = (m * f(x W_up)) W_down                              m = 1 at the start

A factor on the probabilities of a head, or on a neuron, is a factor on the input columns of the layer that reads it:
W' = W diag(m). So the masks sit on the output projections of attention and on the down projections, and fold into the
weights. Put them above the other adapters of a layer (last in the list): an adapter below then reads what is masked,
as it would if the head were gone. Heads that share keys (grouped queries) have one factor: they can only go together.

The L1 term that drives factors to 0 is the regulariser `mask-sparsity`; `core.surgery` cuts heads and neurons out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from tunesmith.core.adapter import Adapter, Below, Handle
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import roles_from_names
from tunesmith.core.part import part
from tunesmith.core.surgery import sites


@part(paper="arXiv:2406.03792", tags=("mergeable",))
class StructureMasks(Adapter):
    """Factors on the inputs of a layer: one per head, per neuron, or, on any other layer, per input.

    Args:
        layer: A linear layer. If none are named: all output and down projections.
        head_lr: Learning rate of heads' factors as a multiple of the run's; the released code has 1 where it is called
            from and 100 in its trainer's signature.
        neuron_lr: The same of the others; 1 and 50 there.

    Attributes:
        factors: (units,) float32.
        width: Input columns per factor.
        of: `heads`, `neurons` or `inputs`; `inputs` until `wire` has seen the model.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __init__(self, layer: LayerSpec, *, head_lr: PositiveFloat = 1.0, neuron_lr: PositiveFloat = 1.0) -> None:
        super().__init__(layer)
        self.head_lr, self.neuron_lr = head_lr, neuron_lr
        self.width, self.of = 1, "inputs"
        self.factors = nn.Parameter(torch.ones(layer.shape[1], device=layer.device))

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """Every layer that reads heads or neurons."""
        return list(sites(model))

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        """Learn what the columns are; a head's share one factor from here on, before a saved adapter is loaded."""
        role = roles_from_names([f"{path}.weight"])[f"{path}.weight"].kind
        site = sites(model).get(path) if role in ("o", "down") else None
        if site is not None:
            self.of, self.width = site.kind, site.width
            if len(self.factors) != site.units:
                ones = self.factors.new_ones(site.units)
                self.factors = nn.Parameter(ones, requires_grad=self.factors.requires_grad)
        return ()

    def columns(self) -> Tensor:
        """The factor of each input column, (in,)."""
        return self.factors if self.width == 1 else self.factors.repeat_interleave(self.width)

    def sparsity(self) -> Tensor:
        """Sum of |m|, ()."""
        return self.factors.abs().sum()

    def lr_ratios(self) -> Mapping[str, float]:
        """The factors' own learning rate."""
        ratio = self.head_lr if self.of == "heads" else self.neuron_lr
        return {"factors": ratio} if ratio != 1 else {}

    def weight(self, W: Tensor) -> Tensor:
        return W * self.columns().to(W.dtype)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        return below(x * self.columns().to(x.dtype))
