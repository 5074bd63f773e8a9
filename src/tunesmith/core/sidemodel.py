"""A helper model with its own cache, beside a generating one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

Retarget = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SideModel:
    """Next-token logits of a helper model for the sequences that another model is generating.

    The helper keeps its own cache. When the sequences are not the cached ones with tokens appended (another batch,
    beams reordered, assisted decoding taken back), the common prefix is kept and the rest computed again.

    Args:
        model: A causal language model, in evaluation mode afterwards.
        pad_token_id: What the generating model pads with, on the left.
        adapter: None runs the model as it is; False with its PEFT adapters disabled; a name with that adapter. One set
            of weights so serves as a tuned and an untuned helper.
        retarget: `(prompt ids, mask) -> (ids, mask)`, if the helper reads the prompt in other words (its own chat
            template); the tokens generated later are appended to both.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_token_id: int | None = None,
        adapter: str | bool | None = None,
        retarget: Retarget | None = None,
    ) -> None:
        self.model = model.eval()
        self.pad_token_id = pad_token_id
        self.adapter = adapter
        self.retarget = retarget
        self.forwards = 0
        """Forward passes so far: the cost of the method."""
        self.reset()

    def reset(self) -> None:
        """Forget the cached sequences."""
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache: DynamicCache | None = None
        self._prompt: Tensor | None = None

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (B, T) prompts and what was generated so far, padded on the left.
            attention_mask: (B, T'), T' <= T, of the prompts; derived from the pad token if None.

        Returns:
            (B, vocabulary) float32.
        """
        raise NotImplementedError
