"""SkipDecode: later tokens run fewer blocks, the same number in every row of the batch.

Del Corro, Del Giorno, Agarwal, Yu, Awadallah and Mukherjee, "SkipDecode: Autoregressive Skip Decoding with Batching and
Caching for Efficient LLM Inference", 2023.

    n(t) = n_max - round((n_max - n_min) min(t, T) / T)        blocks that the token at position t runs
    A(t) = {0 .. w-1} and {L - (n(t) - w) .. L-1}               which: w warm-up blocks, then the topmost

n never rises, so A(t) is a subset of A(t') for t' < t: whichever block a token runs has the keys and values of all
tokens before it, and nothing is computed twice. A token that skips a block keeps its hidden state, and is neither query
nor key there.

Where we differ from released code: there is none. The linear decay and the warm-up blocks are the paper's; ties are
rounded so that integers decide, and how prompts are treated is an option. The paper's positions are columns of a batch
of equal lengths; ours are each row's own, so that a batch padded on the left gives what its rows give alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from tunesmith.core.inference import BlockCall, BlockInference
from tunesmith.core.part import part
from tunesmith.errors import ModelError

IGNORED = -100
_NEVER = 2**62


@part(
    paper="arXiv:2307.02628",
    refuses={
        "encoder-decoder": "it skips blocks of a decoder-only stack",
        "padding-free": "rows laid end to end begin anew, and later columns may not run more blocks than earlier ones",
    },
)
class SkipDecode(BlockInference):
    """Fewer blocks for later tokens, by a schedule of the position.

    Attach it for training too: a model must learn to bear the skipped blocks.

    Args:
        n_min: Blocks that the last token runs, at least warmup + 1; None for all.
        max_length: T, the number of tokens after which `n_min` is reached.
        n_max: Blocks that the first token runs; None for all.
        warmup: Lowest blocks, which every token runs.
        prompt: `"position"`: tokens of the prompt follow the schedule like others, so that the number of blocks
            depends on the position alone. `"max"`: they run `n_max`; in training they are the tokens before the first
            label, or those of `prompts(...)`.
    """

    neutral: ClassVar[Mapping[str, object]] = {"n_min": None, "max_length": 64}
    frugal: ClassVar[Mapping[str, object]] = {"n_min": 2, "max_length": 12}

    def __init__(
        self,
        *,
        n_min: PositiveInt | None,
        max_length: PositiveInt,
        n_max: PositiveInt | None = None,
        warmup: PositiveInt = 1,
        prompt: Literal["max", "position"] = "position",
    ) -> None:
        super().__init__()
        self.n_min, self.n_max = n_min, n_max
        self.max_length = max_length
        self.warmup = warmup
        self.prompt = prompt
        self._limits: list[int] = []
        self._told: Tensor | None = None
        self._labelled: Tensor | None = None
        self._times = torch.empty(0)
        self._earliest: list[int] = []
        self._latest: list[int] = []
        self._hook: Any = None

    def check(self, count: int) -> None:
        least, most = self._bounds(count)
        if not self.warmup + 1 <= least <= most <= count:
            raise ModelError(
                f"skipdecode needs warmup + 1 <= n_min <= n_max <= the model's {count} blocks; found warmup "
                f"{self.warmup}, n_min {least}, n_max {most}"
            )
        # Block l >= w belongs to A(t) as long as n(t) >= L - l + w: up to a position of its own.
        runs = [self._blocks_at(t, count) for t in range(self.max_length + 1)]
        self._limits = []
        for index in range(count):
            needed = 0 if index < self.warmup else count - index + self.warmup
            self._limits.append(next((t for t, n in enumerate(runs) if n < needed), _NEVER))

    def _bounds(self, count: int) -> tuple[int, int]:
        return self.n_min or count, self.n_max or count

    def _blocks_at(self, t: int, count: int) -> int:
        least, most = self._bounds(count)
        return most - (2 * (most - least) * min(t, self.max_length) + self.max_length) // (2 * self.max_length)

    def blocks_at(self, t: int) -> int:
        """n(t) on the attached model."""
        return sum(t < limit for limit in self._limits)

    def active(self, t: int) -> list[int]:
        """A(t) on the attached model, ascending."""
        return [index for index, limit in enumerate(self._limits) if t < limit]

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        assert self.model is not None
        self._hook = self.model.register_forward_pre_hook(self._read_labels, with_kwargs=True)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        super().detach()

    @contextmanager
    def prompts(self, lengths: Tensor) -> Iterator[None]:
        """Say how many leading columns of each row are prompt, (B,) int64, padding included, where `prompt="max"`."""
        self._told = lengths
        try:
            yield
        finally:
            self._told = None

    def _read_labels(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        labels = kwargs.get("labels")
        # Leading columns without a label; all of them in a row that has none.
        self._labelled = None if labels is None else ((labels != IGNORED).cumsum(1) == 0).sum(1)

    def run(self, call: BlockCall) -> Tensor:
        if call.index == 0:
            self._begin(call)
        limit = self._limits[call.index]
        rows, length, _ = call.hidden.shape
        # No row's time falls from one column to the next, so the tokens that run this block come first.
        columns = bisect_left(self._earliest, limit)
        self._cost.done += rows * columns
        self._cost.full += rows * length
        out = call.run_first(columns)
        if columns and self._latest[columns - 1] >= limit:
            # Rows of different lengths: at these columns some of them are past the block's last position already.
            stays = self._times[:, :columns, None] >= limit
            out = torch.where(stays, call.hidden[:, :columns], out)
        return out if columns == length else torch.cat([out, call.hidden[:, columns:]], dim=1)

    def _begin(self, call: BlockCall) -> None:
        """Once per forward pass: the time t of every token, (B or 1, q), and its extremes over the rows."""
        # Some models give padding the position -1: on the left it counts as 0, on the right as the token before it.
        times = call.positions.clamp_min(0).cummax(1).values
        if bool(((call.positions >= 0) & (call.positions < times)).any()):
            raise ModelError(
                "skipdecode needs positions that rise along each row, and here they begin anew in the middle of one: "
                "rows laid end to end cannot run it; pad them instead (data.padding_free: false)"
            )
        if self.prompt == "max":
            times = self._with_prompts(call, times)
        self._times = times
        self._earliest, self._latest = torch.stack([times.amin(0), times.amax(0)]).tolist()

    def _with_prompts(self, call: BlockCall, times: Tensor) -> Tensor:
        lengths = self._told if self._told is not None else self._labelled
        length = times.shape[1]
        if lengths is not None:
            columns = call.past + torch.arange(length, device=times.device)
            return torch.where(columns < lengths.to(times.device)[:, None], 0, times)
        if call.layer is not None and not torch.is_grad_enabled():
            if call.past == 0:
                return torch.zeros_like(times)
            if length == 1:
                return times
        raise ModelError(
            'skipdecode with prompt="max" cannot tell prompt from answer here: train with labels that are '
            f"{IGNORED} on the prompt, or run inside `with method.prompts(lengths)`, or generate with a cache and "
            'without assisted decoding or chunked prompts; prompt="position" needs none of this'
        )
