"""How much attention the tokens of a block get, counted without an n x n matrix, and which of them to keep.

Tokens are taken in groups of `block` columns. With c_i the number of tokens that token i may attend to, and P(a, b) the
pairs (i, j), i in group a and j in group b, in which i may attend to j,

    lift(a, b) = 1 / |P(a, b)| sum over P(a, b) of c_i mean_heads A[i, j]
    score(b)   = sum_a |P(a, b)| lift(a, b) / sum_a |P(a, b)|

Uniform attention has lift 1 at any length, so that a threshold means the same for short and long rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.core.inference import BlockCall
from tunesmith.core.loss import IGNORED
from tunesmith.core.packing import BOUNDS
from tunesmith.errors import ModelError

SEEN = "tunesmith_seen"
_QUERIES = 64


@dataclass
class Pass:
    """One forward pass, kept for blocks that run again under activation checkpointing.

    Attributes:
        positions: What the model gave its blocks; tells the passes apart.
        plain: Whether nothing is dropped.
        records: Whether what the blocks see is kept for calibration.
        shared: Whether all rows keep the same columns, as a cache demands.
        real: (B, n) bool, no padding.
        reads: (B, n) bool, the loss reads the logits there.
        chosen: Columns by block, None for all.
    """

    positions: Tensor
    plain: bool
    records: bool = False
    shared: bool = False
    real: Tensor = field(default_factory=lambda: torch.empty(0))
    reads: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen: dict[int, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Sighting:
    """What one block saw in one pass, on the CPU; g groups of columns.

    Attributes:
        features: (B, g, dim), see `features`.
        lift: (B, g, g), query groups by key groups.
        tokens: (B, g), real tokens of each group.
        forced: (B, g) bool, groups that are kept whatever their score.
    """

    features: Tensor
    lift: Tensor
    tokens: Tensor
    forced: Tensor


class _SeenError(Exception):
    """Carries queries and keys out of a block whose rest need not run."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float) -> None:
        self.query, self.key, self.scaling = query, key, scaling


def _show(module: nn.Module, query: Tensor, key: Tensor, *_: Any, scaling: float | None = None, **__: Any) -> NoReturn:
    raise _SeenError(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(SEEN, _show)


@contextmanager
def _showing(block: nn.Module) -> Iterator[None]:
    """Let the attention of a block show its queries and keys; evaluation mode, so that no random number is drawn."""
    training = {m: m.training for m in block.modules()}
    configs = {id(c): c for m in block.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        block.eval()
        for config in configs.values():
            # Not through the setter, which would reach into the configs of other parts of the model.
            config._attn_implementation_internal = SEEN
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module, mode in training.items():
            module.training = mode


def real_tokens(given: Mapping[str, Any], call: BlockCall) -> Tensor:
    """The tokens that are no padding, (B, n) bool, of a model's inputs and its first block's call.

    Raises:
        ModelError: the mask is of another kind, or rows are laid end to end.
    """
    rows, n, _ = call.hidden.shape
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ModelError(f"tokens can be dropped under a mask of (batch, length) or none; found {tuple(mask.shape)}")
    real = torch.ones(rows, n, dtype=torch.bool, device=call.hidden.device)
    if mask is not None:
        real = mask[:, -n:].to(real.device) != 0
    before = call.positions.masked_fill(~real, 0).cummax(1).values
    if given.get(BOUNDS) is not None or bool((real & (call.positions < before)).any()):
        raise ModelError(
            "positions must rise along each row for tokens to be dropped, and here they begin anew in the middle of "
            "one: pad rows instead of laying them end to end (data.padding_free: false)"
        )
    return real


def read_positions(given: Mapping[str, Any], told: Tensor | None, real: Tensor) -> Tensor:
    """Where the loss reads logits, (B, n) bool: before each label, or at `logits_to_keep`, or where `told`.

    Args:
        given: A model's inputs.
        told: (B or 1, n) bool, counts before these.
        real: From `real_tokens`.

    Raises:
        ModelError: neither is given, or they are of another length.
    """
    n, labels, keep = real.shape[1], given.get("labels"), given.get("logits_to_keep")
    if told is not None:
        reads = told
    elif labels is not None:
        reads = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    elif isinstance(keep, Tensor):
        reads = torch.zeros(1, n, dtype=torch.bool, device=keep.device).index_fill(1, keep, True)
    elif keep:
        reads = (torch.arange(n) >= n - int(keep))[None]
    else:
        raise ModelError(
            "it cannot be told which logits the loss reads, and tokens there may not be dropped: give the model "
            "`labels` or `logits_to_keep`, or run it inside `with method.reading(positions)`"
        )
    if reads.shape[1] != n or len(reads) not in (1, len(real)):
        raise ModelError(f"labels are of (rows, tokens) {tuple(reads.shape)}, and the model has {tuple(real.shape)}")
    return reads.to(real.device).expand_as(real)


def forced_groups(real: Tensor, reads: Tensor, block: int) -> Tensor:
    """Groups that are kept whatever their score, (B, g) bool: the first and the last of a row, and where it is read."""
    filled = grouped(real.float(), block, 1) > 0
    last = filled.shape[1] - 1 - filled.flip(1).int().argmax(1)
    forced = grouped(reads.float(), block, 1) > 0
    forced = forced.scatter(1, torch.stack([filled.int().argmax(1), last], dim=1), True)
    # The last columns may be less than a group, so that all rows must keep them or none.
    forced[:, -1] = True
    return forced


def spread(kept: Tensor, block: int, n: int) -> Tensor:
    """The columns of groups (B, k) ascending, the last of the n columns' groups among them; (B, columns) int64."""
    wide = (kept[:, :, None] * block + torch.arange(block, device=kept.device)).flatten(1)
    return wide[:, : wide.shape[1] - (-n % block)]


def grouped(x: Tensor, block: int, dim: int) -> Tensor:
    """Sums over groups of `block` entries along a dimension, the last group padded with zeros."""
    n = x.shape[dim]
    pad = [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, -n % block]
    return F.pad(x, pad).unflatten(dim, (-1, block)).sum(dim % x.dim() + 1)


def pairs(tokens: Tensor) -> Tensor:
    """|P(a, b)| under causal attention, (B, g, g) float32, of groups with (B, g) real tokens."""
    before = (tokens[:, :, None] * tokens[:, None, :]).tril(-1)
    return before + torch.diag_embed(tokens * (tokens + 1) / 2)


def score(lift: Tensor, tokens: Tensor) -> Tensor:
    """score(b), (B, g); 0 for groups without tokens."""
    weight = pairs(tokens)
    return (lift * weight).sum(1) / weight.sum(1).clamp_min(1)


@torch.no_grad()
def attention_lift(call: BlockCall, real: Tensor, block: int) -> Tensor:
    """lift(a, b) of a block's own attention, (B, g, g) float32; some queries at a time, no cache, no dropout.

    Args:
        call: Of a pass without earlier columns.
        real: (B, n) bool, the tokens that are no padding.
        block: Columns of a group.

    Raises:
        ModelError: the attention is not behind transformers' interface.
    """
    try:
        with _showing(call.block):
            call.run_apart()
    except _SeenError as seen:
        query, key, scaling = seen.query, seen.key, seen.scaling
    else:
        raise ModelError(
            f"{type(call.block).__name__} does not compute its attention through transformers' interface; its scores "
            "cannot be seen"
        )
    rows, _, n, _ = query.shape
    query = query.unflatten(1, (key.shape[1], -1))
    counts = real.cumsum(1) * real
    columns = torch.arange(n, device=real.device)
    tokens = grouped(real.float(), block, 1)
    mass = query.new_zeros(rows, tokens.shape[1], tokens.shape[1], dtype=torch.float32)
    size = block * -(-_QUERIES // block)
    for low in range(0, n, size):
        high = min(low + size, n)
        scores = torch.einsum("bkgqd,bksd->bkgqs", query[..., low:high, :], key[:, :, :high]).float() * scaling
        allowed = real[:, None, :high] & (columns[:high] <= columns[low:high, None])
        scores = scores.masked_fill_(~allowed[:, None, None], -torch.inf)
        # A padded query before all real keys attends to nothing.
        part = scores.softmax(-1).nan_to_num_(0.0).mean((1, 2)) * counts[:, low:high, None]
        part = grouped(grouped(part, block, 1), block, 2)
        start = low // block
        mass[:, start : start + part.shape[1], : part.shape[2]] = part
    return mass / pairs(tokens).clamp_min(1)


def features(hidden: Tensor, real: Tensor, block: int) -> Tensor:
    """What a predictor sees of the groups: the mean of their tokens, each of length sqrt(dim); (B, g, dim) float32."""
    wide = hidden.detach().float()
    wide = wide * real[..., None] * (wide.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
    return grouped(wide, block, 1) / grouped(real.float(), block, 1).clamp_min(1)[..., None]


def choose(scores: Tensor, tokens: Tensor, forced: Tensor, ratio: float, tau: Tensor | None) -> Tensor:
    """The groups to keep, (B, k) int64 ascending: each row its k best, k the most that any row asks for.

    Args:
        scores: (B, g).
        tokens: (B, g), real tokens of each group; groups without any come last.
        forced: (B, g) bool, kept whatever their score.
        ratio: Share of its groups that a row asks for without a threshold.
        tau: The threshold; a row asks for what lies at or above it. None for the share.
    """
    rank = scores.masked_fill(tokens == 0, -torch.inf).masked_fill(forced, torch.inf)
    asked = forced.sum(1)
    if tau is not None:
        asked = ((rank >= tau) & (tokens > 0) | forced).sum(1)
    else:
        # A little less than the product, so that 0.1 of 30 groups are 3 whatever the rounding.
        asked = asked.maximum(((tokens > 0).sum(1) * ratio - 1e-4).ceil().long())
    # Stable: equal scores are kept from the left, on every device.
    order = rank.argsort(dim=1, descending=True, stable=True)
    return order[:, : int(asked.max())].sort(1).values
