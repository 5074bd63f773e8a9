"""DePT: a short soft prompt, and a low-rank offset of the input embeddings.

Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024.

    input = [P ; E + c A B],    P (m, d),  A (S, r),  B (r, d),  c = alpha / sqrt(r)                      (section 2.2)

Row t of A B is added to the row's t-th token. A prompt of l tokens has l d numbers; m d + r (S + d) = l d makes a
shorter sequence of as many. B starts at zero, so that DePT starts at prompt tuning with the same P.

Where we differ from the released code: it adds a tensor of exactly S rows by column, so that every batch must be padded
to S, and on the left-hand side padding takes the rows; here the index of the token among the real ones counts. And
it adds the offset to every token in training but, while a decoder generates, only to the tokens of the prefill, so that
the second generated token already sees another model than the one that was trained; here a token of index t gets row t
wherever it is embedded, and generating with a cache equals computing everything anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.part import part
from tunesmith.core.prompt import Prompt, PromptContext, PromptOut, PromptSpace
from tunesmith.errors import ModelError


@part(
    paper="arXiv:2309.05173",
    tags=("prepends",),
    refuses={"padding-free": "the prompt goes before each row, and rows laid end to end have no room for it"},
)
class DePT(Prompt):
    """A prompt of `num_virtual_tokens` vectors and a position-wise low-rank offset.

    Args:
        space: The frozen input embedding that the prompt stands beside.
        num_virtual_tokens: m, the length of the prompt; 0 leaves the offset alone.
        rank: r of the offset; 0 is plain prompt tuning.
        max_length: S, the longest input in tokens, answers of a decoder included.
        alpha: The offset is multiplied by alpha / sqrt(rank).
        std: Standard deviation of the prompt's start, P ~ N(0, std^2); 1 is the released code's.
        init_ids: Token ids whose vectors the prompt starts at instead, such as `tokenizer("...").input_ids`; repeated
            or cut to m.
        lr_ratio: The learning rate of A and B as a multiple of the run's, which is the prompt's. The paper searches
            prompt rates of 0.3 and 0.4 with rates of 0.3, 0.005 and 0.0005 for A and B.
    """

    every_token: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, object]] = {"num_virtual_tokens": 0}

    def __init__(
        self,
        space: PromptSpace,
        *,
        num_virtual_tokens: NonNegativeInt = 40,
        rank: NonNegativeInt = 8,
        max_length: PositiveInt = 256,
        alpha: PositiveFloat = 8.0,
        std: NonNegativeFloat = 1.0,
        init_ids: list[int] | None = None,
        lr_ratio: PositiveFloat = 0.01,
    ) -> None:
        super().__init__(space)
        self.max_length, self.rank, self.lr_ratio = max_length, rank, lr_ratio
        self.longest = max_length if rank else None
        self.scale = alpha / math.sqrt(rank) if rank else 0.0
        start = (
            std * torch.randn(num_virtual_tokens, space.dim, device=space.device)
            if init_ids is None
            else _repeated(space.words(init_ids), num_virtual_tokens)
        )
        self.P = nn.Parameter(start)
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        if rank:
            self.A = nn.Parameter(torch.empty(max_length, rank, device=space.device))
            self.B = nn.Parameter(torch.zeros(rank, space.dim, device=space.device))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def length(self) -> int:
        return self.P.shape[0]

    def offset(self) -> Tensor:
        """c A B, (S, d) float32; row t belongs to a row's t-th token, from 0."""
        if self.A is None or self.B is None:
            return self.P.new_zeros(self.max_length, self.dim)
        return self.scale * (self.A @ self.B)

    def forward(self, context: PromptContext) -> PromptOut:
        """The prompt, and the offset of the tokens at hand.

        Raises:
            ModelError: an input is longer than `max_length`.
        """
        if self.A is None:
            return PromptOut(prefix=self.P)
        longest = int(context.positions.max()) + 1
        if longest > self.max_length:
            raise ModelError(
                f"dept: an input has {longest} tokens, but the offset was made for max_length={self.max_length}; give "
                "it a larger max_length or shorten the input (data.max_length)"
            )
        return PromptOut(prefix=self.P, add=F.embedding(context.positions, self.offset()[:longest]))

    def lr_ratios(self) -> Mapping[str, float]:
        """A and B learn at `lr_ratio` times the run's learning rate."""
        return {"A": self.lr_ratio, "B": self.lr_ratio} if self.rank else {}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.length}, rank={self.rank}, max_length={self.max_length}"


def restart_offset(model: nn.Module) -> int:
    """Set B of every DePT to zero, to begin a new task from another task's P and A (the paper's transfer).

    Returns:
        The number of prompts set.
    """
    found = [m for m in model.modules() if isinstance(m, DePT) and m.B is not None]
    with torch.no_grad():
        for made in found:
            made.B.zero_()
    return len(found)


def _repeated(rows: Tensor, length: int) -> Tensor:
    times: Sequence[int] = (math.ceil(length / rows.shape[0]), 1)
    return rows.repeat(*times)[:length].clone()
