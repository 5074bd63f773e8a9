"""Intuitive Fine-Tuning: predict from a blend of answer and own guesses, each token weighted by what follows.

Hua, Qi, Zhang, Yu, Ding, Lv, Tian and Zhou, "Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single
Process", 2024; the options are those of the released code.

    g_t = argmax p(. | x_<t)                              greedy guesses, on response tokens alone, without gradient
    e'_t = (1 - lambda) e(x_t) + lambda e(g_t)                                      temporal residual connection
    l_t = -log p(x_t | e'_<t)
    u_t = sum_{k >= t} gamma^(k - t) l_k / n,     w_t = n u_t / sum_k u_k                     relation propagation
    L = mean over sequences of 1/n sum_t w_t l_t                                  n response tokens of the sequence

A step costs one forward pass more than plain fine-tuning. gamma = 0 means w = 1, as released; the formula's own limit
would weigh each token by its loss. Where we differ from the released code: the weights of `side="right"` are offset by
the smallest of the sequence instead of the whole batch, so that a row's loss does not depend on its neighbours; a
sequence without response tokens does not count instead of dividing by zero; and lambda is constant (the code also
offers a ramp and noise over the steps, which its published runs do not use).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from pydantic import Field
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED, Labelled, labelled, targets_of, token_losses
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.packing import segments
from tunesmith.core.part import part
from tunesmith.errors import ModelError

Share = Annotated[float, Field(ge=0, le=1)]
TINY = 1e-30


@part(
    paper="arXiv:2405.11870",
    refuses={"encoder-decoder": "the guesses go into the sequence that they are predicted from, as in a decoder"},
)
class IntuitiveFineTuning(Objective):
    """Cross-entropy on a blend of answer and guesses, weighted by the discounted loss of the tokens that follow.

    It works without gradients too, for forward-only optimizers; its guesses then make the loss a step function.

    Args:
        lam: lambda, the share of the guess in the blend; 0 predicts from the answer itself, in one pass.
        gamma: The discount per token; 0 gives every token the weight 1.
        detach_weights: Keep the gradient out of the weights. The released code lets it through.
        guess_mode: Whether the guesses are made with the dropout of training (`train`, as released) or without.
        kind: What is propagated: each token's `loss` divided by n, its `logps` (undivided, which matters only to
            `softmax` and `log`), or 1 (`mask`).
        side: `left` weighs a token by itself and what follows; `right` by the inverse of itself and what came before.
        norm: How sums u become weights, up to a factor that makes their mean 1: u (`L1`), u^2 (`L2`), exp u
            (`softmax`), log(1 + u) (`log`). With `side="right"`, v = u + min u takes the place of u and the weights
            are 1 / v, 1 / v^2, exp(1 / v) and 1 / log(1 + v).
    """

    def __init__(
        self,
        *,
        lam: Share = 0.2,
        gamma: Share = 0.95,
        detach_weights: bool = False,
        guess_mode: Literal["train", "eval"] = "train",
        kind: Literal["loss", "logps", "mask"] = "loss",
        side: Literal["left", "right"] = "left",
        norm: Literal["L1", "L2", "softmax", "log"] = "L1",
    ) -> None:
        self.lam, self.gamma, self.detach_weights, self.guess_mode = lam, gamma, detach_weights, guess_mode
        self.kind, self.side, self.norm = kind, side, norm

    def count(self, batch: Batch) -> Tensor:
        """The number of sequences with response tokens, ()."""
        answered = segments(batch)[:, 1:][targets_of(batch) != IGNORED]
        return torch.tensor(answered.unique().numel(), device=answered.device)

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch; a sequence is a row, or a segment of a flattened batch.

        Returns:
            The loss, () float32; `sft_loss`, the same without the weights; `guessed`, the share of right guesses.
        """
        scalars: dict[str, Tensor] = {}
        if self.lam:
            with torch.no_grad(), _without_dropout(model) if self.guess_mode == "eval" else nullcontext():
                guesses = labelled(model, batch)
            guess = guesses.logits.argmax(-1)
            if len(guess):
                scalars["guessed"] = (guess == guesses.labels).float().mean()
            with _blended(model, batch["input_ids"].index_put(tuple(guesses.index.T), guess), self.lam):
                found = labelled(model, batch)
        else:
            found = labelled(model, batch)
        losses = token_losses(found)
        weights, n = self.weights(losses, found)
        share = self.share(batch, total)
        scalars["sft_loss"] = (losses.detach() / n).sum() / share
        return (weights * losses / n).sum() / share, scalars

    def weights(self, losses: Tensor, found: Labelled) -> tuple[Tensor, Tensor]:
        """w_t and n of each response token, (tokens,) float32 each; the mean of w over a sequence is 1."""
        _, row = found.segment.unique(return_inverse=True)
        n = torch.bincount(row, minlength=1).to(losses.dtype)[row]
        if self.gamma == 0 or not len(losses):
            return torch.ones_like(losses), n
        column = found.index[:, 1]
        column = column - _per_row(column, row, "amin")[row]
        losses = losses.detach() if self.detach_weights else losses
        item = {"loss": losses / n, "logps": losses, "mask": torch.ones_like(losses)}[self.kind]
        dense = item.new_zeros(int(row.max()) + 1, int(column.max()) + 1).index_put((row, column), item)
        if self.side == "left":
            u = discounted(dense, self.gamma)[row, column]
            raw = {"L1": u, "L2": u.square(), "softmax": u, "log": u.log1p()}[self.norm]
        else:
            u = discounted(dense.flip(1), self.gamma).flip(1)[row, column]
            v = u + _per_row(u, row, "amin")[row]
            v = v.clamp_min(TINY)
            raw = {"L1": 1 / v, "L2": 1 / v.square(), "softmax": 1 / v, "log": 1 / v.log1p()}[self.norm]
        if self.norm == "softmax":
            raw = (raw - _per_row(raw.detach(), row, "amax")[row]).exp()
        return n * raw / _per_row(raw, row, "sum")[row].clamp_min(TINY), n


@contextmanager
def _blended(model: nn.Module, guessed: Tensor, lam: float) -> Iterator[None]:
    """Embed (1 - lam) of the ids that the model is given and lam of `guessed`, (B, T), in the model's own embedding.

    Inside the model's forward, so that whatever scales, shards, prompts or adapts the embedding goes on as it does.

    Raises:
        ModelError: the model did not embed its ids by its input embedding.
    """
    embedding = extract_model_from_parallel(model, keep_fp32_wrapper=True).get_input_embeddings()
    done = []

    def both(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.cat([args[0], guessed]), *args[1:]

    def blend(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        own, other = out.chunk(2)
        done.append(True)
        return (1 - lam) * own + lam * other

    handles = [embedding.register_forward_pre_hook(both), embedding.register_forward_hook(blend)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise ModelError(
            f"intuitive-finetuning: {type(model).__name__} does not embed its input ids by `get_input_embeddings()`, "
            "so that no guesses can be blended in; give lam=0 to go without"
        )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    before = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def discounted(item: Tensor, gamma: float) -> Tensor:
    """u_t = sum_{k >= t} gamma^(k - t) item_k along the last dimension, in log2 steps; the shape of `item`."""
    shift, length = 1, item.shape[-1]
    while shift < length:
        later = item[..., shift:] * gamma**shift
        item = item + nn.functional.pad(later, (0, shift))
        shift *= 2
    return item


def _per_row(values: Tensor, row: Tensor, reduce: str) -> Tensor:
    """One figure per sequence, (sequences,); `reduce` as in `Tensor.scatter_reduce`."""
    start = values.new_zeros(int(row.max()) + 1)
    return start.scatter_reduce(0, row, values, reduce, include_self=False)
