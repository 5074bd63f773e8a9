"""Layer decay: AdamW whose learning rate falls from the head down to the embedding; with or without bias correction.

One of the stabilisers compared by Tinn, Cheng, Gu, Usuyama, Liu, Naumann, Gao and Poon, "Fine-tuning large neural
language models for biomedical natural language processing", Patterns 2023. For a model of L blocks,

    lr_i = lr * delta^(L + 1 - i)      i = 0: the embedding;  i = 1 ... L: the blocks;  i = L + 1: all that is behind

and, since models of small data were long tuned by the optimizer that BERT came with,

    w <- w - lr_i m / (sqrt(v) + eps)  with `bias_correction=False`: the first step is (1 - b1) / sqrt(1 - b2) = 3.16
                                       times as large as AdamW's, m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps

The embedding is all that stands before the first block: positions, ELECTRA's `embeddings_project`, tables of relative
positions. A tensor tied to it is one with it, also an output head. Poolers and norms behind the blocks count as head.
Each stack of an encoder-decoder counts from its own top, and the embedding is one below the deeper one.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from tunesmith.core.freezing import ALL, bottom
from tunesmith.core.modelmap import depths
from tunesmith.core.optimizer import Closure, Optimizer, decay_groups
from tunesmith.core.part import part

Factor = Annotated[float, Field(gt=0, le=1)]


@part(paper="arXiv:2112.07869")
class LayerDecay(torch.optim.AdamW, Optimizer):
    """AdamW with a learning rate for each layer.

    Args:
        params: Parameters or groups; `groups` makes them for a model, with `layer_ratio`, the multiple of lr.
        lr: Of the head.
        weight_decay: Decoupled; of groups that name none. As in AdamW it is multiplied by the layer's rate.
        layer_decay: delta; 1 gives every layer the same rate. 0.8 to 0.95 are usual.
        bias_correction: Whether the moments are divided by 1 - b^t.
        betas: b1 and b2.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        *,
        layer_decay: Factor = 0.9,
        bias_correction: bool = True,
        betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        self.bias_correction = bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group with a `layer_ratio` and no rate of its own gets its multiple of lr."""
        if "layer_ratio" in param_group and "lr" not in param_group:
            param_group["lr"] = self.defaults["lr"] * param_group["layer_ratio"]
        super().add_param_group(param_group)

    @classmethod
    def groups(cls, model: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """Up to two groups per layer, with and without weight decay, from the embedding up.

        Raises:
            ModelError: the model has no numbered blocks.
        """
        delta, below = options.get("layer_decay", 0.9), layers_below_head(model)
        found = []
        for distance in sorted(set(below.values()), reverse=True):
            own = [(name, p) for name, p in model.named_parameters() if below[name] == distance]
            groups = decay_groups(own, model, weight_decay)
            found += [{**group, "layer_ratio": delta**distance, "layers_below_head": distance} for group in groups]
        return found

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients, as for any torch optimizer.
        """
        if self.bias_correction:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"]
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, v.sqrt().add_(group["eps"]), value=-lr)
        return loss

    def state_formula(self) -> int:
        """Bytes of the state: two moments of each parameter, and a counter of 4 bytes."""
        return sum(2 * p.numel() * p.element_size() + 4 for group in self.param_groups for p in group["params"])


def layers_below_head(model: nn.Module) -> dict[str, int]:
    """L + 1 - i of every parameter: 0 for the head, 1 for the top block, one more than the blocks for the embedding.

    Raises:
        ModelError: the model has no numbered blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    embedding, place = bottom(model, 0, stack=ALL), depths(names)
    deepest = max(depth.count for depth in place.values() if depth)
    found = {}
    for name in names:
        depth = place[name]
        found[name] = depth.count - depth.index if depth else deepest + 1 if name in embedding else 0
    return found
