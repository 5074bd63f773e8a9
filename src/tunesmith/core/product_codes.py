"""Attention over the keys whose product codes agree most with the query's.

A codebook cuts every query and key of a layer, (dim), into `dim / size` parts and names each part by the nearest of its
codewords (L1). Of the keys that a query sees it keeps those with the most equal codes; the softmax is over these alone.
For the backward pass queries, keys, values and the indices of the kept keys are held, nothing of queries times keys.

An attention function, registered with transformers, asks the `Selector` of its layer; a layer without one, or one that
selects nothing now, computes what the model always did.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError

NAMES = {"sdpa": "tunesmith_sparse", "eager": "tunesmith_sparse_eager"}
"""What the attention is called, by what it is where nothing is selected."""
MOST = 2**15  # vectors that a codebook learns from in one step; of more, as many are drawn
_ROOM = 2**24  # numbers that one tensor in a loop over queries may have
_SELECTORS, _WAS = "tunesmith_selectors", "tunesmith_attention_was"
_BETAS = (0.9, 0.999)


class Codebook(nn.Module):
    """The codewords of a layer whose heads have `dim` numbers: `count`, at most 256, for each part of `size`.

    They learn by a loss of their own; what is random follows from `name`.

    Attributes:
        words: (dim / size, count, size) float32, from N(0, 1).
        used: Whether attention goes by it already, (); False while it learns.
        loss: Of the last batch that it learnt from, ().
    """

    words: Tensor
    used: Tensor
    loss: Tensor
    gradient: Tensor
    moments: Tensor

    def __init__(self, dim: int, size: int, count: int, name: str, device: torch.device) -> None:
        super().__init__()
        made = torch.randn(dim // size, count, size, generator=generator(name, "codewords")).to(device)
        self.register_buffer("words", made)
        self.register_buffer("used", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("loss", torch.zeros((), device=device), persistent=False)
        self.register_buffer("gradient", torch.zeros_like(made), persistent=False)
        self.register_buffer("moments", made.new_zeros(2, *made.shape), persistent=False)
        self.name, self.learnt, self.steps = name, 0.0, 0

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The codes of vectors (..., dim): (parts, ...) uint8, the part first."""
        shape, z = z.shape[:-1], _parts(z, self.words)
        codes = torch.cdist(z, self.words.to(z.dtype), p=1.0).argmin(-1)
        return codes.to(torch.uint8).view(-1, *shape)

    def learn(self, query: Tensor, key: Tensor, valid: Tensor | None, step: int) -> None:
        """Add the gradient of the loss on (B, heads, T, dim) queries and keys, which get none themselves.

        `valid` is (B, T) bool, what is no padding; where there are more than `MOST`, `step` decides which are drawn.
        """
        # In a block that is checkpointed, what is saved here must not count among what the block saves.
        apart = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with apart, torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            words = self.words.detach().clone().requires_grad_()
            loss = self._of(query, valid, words, step) + self._of(key, valid, words, step)
            (found,) = torch.autograd.grad(loss, words)
        tokens = float(query.shape[0] * query.shape[2] if valid is None else valid.sum())
        self.gradient += tokens * found
        self.loss.copy_(loss.detach())
        self.learnt += tokens

    def _of(self, z: Tensor, valid: Any, words: Tensor, step: int) -> Tensor:
        heads, weight = z.shape[1], None if valid is None else valid[:, None].expand(z.shape[:-1]).flatten()
        z = z.detach().flatten(0, -2).to(words.dtype)
        if len(z) > MOST:
            drawn = torch.randperm(len(z), generator=generator(self.name, step, heads))[:MOST].to(z.device)
            z, weight = z[drawn], None if weight is None else weight[drawn]
        return codebook_loss(z, words, weight)

    def training_state(self) -> dict[str, Tensor]:
        """Adam's moments and steps."""
        return {"moments": self.moments.clone(), "steps": torch.tensor(self.steps)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `training_state` gave."""
        self.moments.copy_(state["moments"])
        self.steps = int(state["steps"])


def _parts(z: Tensor, words: Tensor) -> Tensor:
    """(parts, N, size) of vectors (..., dim), in float32 at least."""
    return _wide(z.reshape(-1, words.shape[0], words.shape[2]).transpose(0, 1))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def codebook_loss(z: Tensor, words: Tensor, weight: Tensor | None = None) -> Tensor:
    """|soft - hard|^2 + |z - hard|^2 of vectors (N, dim) and codewords (parts, count, size), each a mean, ().

    `hard` is the nearest codeword of each part, `soft` the mean of all of them weighted by 1 / L1 distance; `weight`,
    (N,), is how much each vector counts.
    """
    z, words = _parts(z, words), _wide(words)
    distance = torch.cdist(z, words, p=1.0).clamp_min(1e-5)
    hard = words.gather(1, distance.argmin(-1, keepdim=True).expand(-1, -1, words.shape[-1]))
    soft = torch.softmax(-distance.log(), -1) @ words
    off = ((soft - hard).square() + (z - hard).square()).mean((0, 2))
    if weight is None:
        return off.mean()
    weight = weight.to(off.dtype)
    return (off * weight).sum() / weight.sum().clamp_min(1)


@torch.no_grad()
def update(books: Sequence[Codebook], lr: float) -> None:
    """A step of Adam for the books that have learnt, by the mean over all tokens of micro-batches and processes."""
    counts = [book.words.new_tensor(book.learnt) for book in books]
    if books and dist.is_available() and dist.is_initialized():
        together = torch.cat([*(book.gradient.flatten() for book in books), torch.stack(counts)])
        dist.all_reduce(together)
        *found, last = together.split([*(book.words.numel() for book in books), len(books)])
        for book, gradient in zip(books, found, strict=True):
            book.gradient.copy_(gradient.view_as(book.gradient))
        counts = list(last)
    for book, count in zip(books, counts, strict=True):
        if count > 0:
            book.steps += 1
            g, (first, second) = book.gradient / count, book.moments
            first.lerp_(g, 1 - _BETAS[0])
            second.lerp_(g.square(), 1 - _BETAS[1])
            root = (second / (1 - _BETAS[1] ** book.steps)).sqrt_().add_(1e-8)
            book.words.sub_(lr / (1 - _BETAS[0] ** book.steps) * first / root)
        book.gradient.zero_()
        book.learnt = 0.0


@dataclass(frozen=True)
class Selection:
    """How many keys a query keeps, and by which codes.

    Attributes:
        book: Whose codes.
        keys: At most 1: the share of the keys of its row that are no padding, rounded up; above: a number.
        latest: Of keys with as many equal codes, whether the last go first, and not the first.
    """

    book: Codebook
    keys: float
    latest: bool = False

    def most(self, keys: Tensor) -> Tensor:
        """Kept of rows of so many keys, int64."""
        wanted = (self.keys * keys.double() - 1e-6).ceil().long() if self.keys <= 1 else keys.clamp_max(int(self.keys))
        return wanted.clamp_min(1)


class Sight:
    """Which of `keys` each of `queries` may see, without a matrix of them where the model has made none.

    Args:
        mask: (B or 1, heads or 1, T, S), bool or added to the logits; None for none.
        causal: Without a mask: whether query i sees keys 0 to i alone.
    """

    def __init__(self, queries: int, keys: int, mask: Tensor | None, causal: bool) -> None:
        self.queries, self.keys, self.causal, self.mask = queries, keys, causal, mask
        if mask is not None and mask.dtype != torch.bool:
            self.mask = mask > torch.finfo(mask.dtype).min / 2

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """(B or 1, heads or 1, stop - start, S) bool of some queries; None if they see everything."""
        if self.mask is not None or not self.causal:
            return None if self.mask is None else self.mask[..., start:stop, : self.keys]
        at = torch.arange(start, stop, device=device)
        return (torch.arange(self.keys, device=device) <= at[:, None])[None, None]

    def seen(self) -> Tensor | None:
        """(B or 1, heads or 1, S) bool: keys that some query sees, so no padding; None for all."""
        return None if self.mask is None else self.mask[..., : self.keys].any(-2)


class Selector(Protocol):
    """What an attention layer asks if it is switched on."""

    switched_on: Callable[[], bool]

    def select(self, query: Tensor, key: Tensor, sight: Sight) -> Selection | None:
        """How (B, heads, T, dim) queries select among (B, key heads, S, dim) in this pass; None to keep all keys."""


@torch.no_grad()
def kept_keys(query: Tensor, key: Tensor, sight: Sight, how: Selection) -> Tensor:
    """The keys with the most equal codes, best first, (B, heads, T, L) int16 or int32; -1 where a query sees fewer.

    Args:
        query: (B, heads, T, dim).
        key: (B, key heads, S, dim); its codes are made once for all heads that share it.
    """
    (B, H, T, _), (groups, S) = query.shape, key.shape[1:3]
    device, seen, most = query.device, sight.seen(), int(how.most(torch.tensor(S)))
    mine, theirs = how.book.encode(query), how.book.encode(key)
    limit = torch.tensor(most, device=device) if seen is None else how.most(seen.sum(-1))[..., None, None]
    place = torch.arange(S, dtype=torch.int32, device=device)
    rank = torch.arange(most, device=device)
    index = torch.empty(B, H, T, most, dtype=torch.int16 if S < 2**15 else torch.int32, device=device)
    for start, stop in _strips(T, B * H * S):
        equal = torch.zeros(B, groups, H // groups, stop - start, S, dtype=torch.int32, device=device)
        for q, k in zip(mine[:, :, :, start:stop], theirs, strict=True):
            equal += q.reshape(B, groups, H // groups, -1, 1) == k[:, :, None, None]
        score = (equal * S + (place if how.latest else S - 1 - place)).view(B, H, -1, S)
        visible = sight.rows(start, stop, device)
        if visible is not None:
            score.masked_fill_(~visible, -1)
        best = score.topk(most, sorted=True)
        there = (best.values >= 0) & (rank < limit)
        index[:, :, start:stop] = torch.where(there, best.indices, -1).to(index.dtype)
    return index


def _strips(length: int, row: int) -> Iterable[tuple[int, int]]:
    """Pieces of a loop over queries, each of which has `row` numbers."""
    step = max(1, _ROOM // max(1, row))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def attend(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, scaling: float, added: Any = None, dropout: float = 0.0
) -> Tensor:
    """Attention over the keys at `index` alone, (B, heads, T, width); a query without any gives zeros.

    Args:
        query: (B, heads, T, dim).
        key: (B, key heads, S, dim).
        value: (B, key heads, S, width).
        index: (B, heads, T, L), -1 for none.
        scaling: Of the products.
        added: To the logits, broadcasting to (B, heads, T, S); None for nothing.
        dropout: Of the probabilities.
    """
    dtype, device = query.dtype, query.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    stays = torch.rand(index.shape, device=device) >= dropout if dropout else None
    full = None if added is None else added[..., : key.shape[2]].expand(*query.shape[:3], -1)
    return _Kept.apply(scaling, 1 - dropout, query.to(dtype), key.to(dtype), value.to(dtype), index, full, stays)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaling: float, kept: float, *given: Any) -> Tensor:
        ctx.save_for_backward(*given)
        ctx.scaling, ctx.kept = scaling, kept
        out = given[0].new_empty(*given[0].shape[:3], given[2].shape[-1])
        for s in _Strip.all(ctx, given):
            out[:, :, s.at] = (s.used.to(out.dtype)[..., None, :] @ s.values).view_as(out[:, :, s.at])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors  # read once: activation checkpointing gives it away only once
        query, key, value, index, added, _ = given
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros_like(_wide(t).contiguous()) for t in (key, value))
        to_added = added.new_zeros(added.shape) if ctx.needs_input_grad[6] else None
        for s in _Strip.all(ctx, given):
            dy = s.shaped(grad[:, :, s.at])
            of_used = _wide((s.values @ dy[..., None])[..., 0])
            of_used = of_used if s.stays is None else of_used * s.stays / ctx.kept
            of_logits = s.probabilities * (of_used - (s.probabilities * of_used).sum(-1, keepdim=True))
            slope = (of_logits * ctx.scaling).to(query.dtype)
            to_query[:, :, s.at] = (slope[..., None, :] @ s.keys).view_as(to_query[:, :, s.at])
            s.scatter(to_key, slope[..., None] * s.query[..., None, :])
            s.scatter(to_value, s.used.to(dy.dtype)[..., None] * dy[..., None, :])
            if to_added is not None:
                where = s.places.view_as(index[:, :, s.at])
                to_added[:, :, s.at].scatter_add_(-1, where, of_logits.view_as(where).to(to_added.dtype))
        return None, None, to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, to_added, None


class _Strip:
    """Some queries and the keys that they keep, (B, key heads, heads that share them, queries, L, ...), made anew."""

    def __init__(self, ctx: Any, at: slice, given: Sequence[Any]) -> None:
        query, key, value, index, added, stays = given
        self.at, self.groups = at, key.shape[1]
        self.query, some = self.shaped(query[:, :, at]), self.shaped(index[:, :, at])
        self.places = some.long().clamp_min(0)
        self.keys, self.values = self.gather(key), self.gather(value)
        logits = _wide((self.keys @ self.query[..., None])[..., 0]) * ctx.scaling
        if added is not None:
            logits = logits + added[:, :, at].gather(-1, self.places.flatten(1, 2)).view_as(logits)
        # A query that sees nothing has a softmax over nothing.
        self.probabilities = torch.softmax(logits.masked_fill(some < 0, -torch.inf), -1).nan_to_num(0.0)
        self.stays = None if stays is None else self.shaped(stays[:, :, at])
        self.used = self.probabilities if self.stays is None else self.probabilities * self.stays / ctx.kept

    @classmethod
    def all(cls, ctx: Any, given: Sequence[Any]) -> Iterable[_Strip]:
        B, H, T, dim = given[0].shape
        return (cls(ctx, slice(*ends), given) for ends in _strips(T, B * H * given[3].shape[-1] * dim))

    def shaped(self, t: Tensor) -> Tensor:
        return t.unflatten(1, (self.groups, -1))

    def scatter(self, onto: Tensor, t: Tensor) -> None:
        onto.flatten(0, 2).index_add_(0, self._rows(onto), t.flatten(0, -2).to(onto.dtype))

    def gather(self, t: Tensor) -> Tensor:
        return t.flatten(0, 2)[self._rows(t)].view(*self.places.shape, -1)

    def _rows(self, t: Tensor) -> Tensor:
        first = torch.arange(0, t.shape[:3].numel(), t.shape[2], device=t.device)
        return (first.view(*t.shape[:2], 1, 1, 1) + self.places).flatten()


def _sparse(plain: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    made = [one for one in module.__dict__.get(_SELECTORS, {}).values() if one.switched_on()]
    if not made:
        return plain(module, query, key, value, mask, **given)
    T, S, causal = query.shape[2], key.shape[2], given.get("is_causal")
    causal = mask is None and T > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)
    S = T if causal and S > T else S  # the first pass with a static cache, the rest of which is empty
    sight = Sight(T, S, mask, causal)
    how = made[-1].select(query, key[:, :, :S], sight)
    if how is None:
        return plain(module, query, key, value, mask, **given)
    if unknown := [name for name in ("softcap", "s_aux") if given.get(name) is not None]:
        raise ModelError(f"{type(module).__name__} has {unknown[0]!r}, which attention over selected keys has not")
    key, value = key[:, :, :S], value[:, :, :S]
    added = given.get("position_bias")
    if mask is not None and mask.dtype != torch.bool:
        added = mask if added is None else mask + added
    scaling = given.get("scaling") or query.shape[-1] ** -0.5
    index = kept_keys(query, key, sight, how)
    out = attend(query, key, value, index, scaling, added, given.get("dropout", 0.0))
    return out.transpose(1, 2).contiguous(), None


def _eager(module: nn.Module, *args: Any, **given: Any) -> Any:
    # Every architecture has its own; it stands beside the module's class.
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"](module, *args, **given)


def plug(model: nn.Module, attention: nn.Module, made: Selector) -> SimpleNamespace:
    """Let a selector into an attention layer of a transformers model; what is returned has `remove()`.

    The last one out gives the model its attention function back.

    Raises:
        ModelError: the model's attention is not behind transformers' interface, or is of another kind.
    """
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before not in NAMES.values():
        if before in NAMES and isinstance(model, PreTrainedModel):
            model.set_attn_implementation(NAMES[before])  # only warns where that is not possible
        if before not in NAMES or config._attn_implementation != NAMES[before]:
            raise ModelError(
                f"{type(model).__name__} computes its attention by {before!r}; attention over selected keys goes with "
                "models behind transformers' attention interface, `attn_implementation='sdpa'` or 'eager', rows that "
                "are padded (`data.padding_free` false), and no other part that reaches into attention"
            )
        model.__dict__[_WAS] = before
    held: OrderedDict[int, Selector] = attention.__dict__.setdefault(_SELECTORS, OrderedDict())
    handle = RemovableHandle(held)
    held[handle.id] = made
    return SimpleNamespace(remove=partial(_unplug, model, handle))


def _unplug(model: nn.Module, handle: RemovableHandle) -> None:
    handle.remove()
    if not any(m.__dict__.get(_SELECTORS) for m in model.modules()) and _WAS in model.__dict__:
        cast(Any, model).set_attn_implementation(model.__dict__.pop(_WAS))


for _name, _plain, _mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(NAMES[_name], partial(_sparse, _plain))
    AttentionMaskInterface.register(NAMES[_name], _mask)
