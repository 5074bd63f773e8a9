"""Sparse-GIN attention: a small graph network beside each attention, on the graph that its own weights draw.

Buehler, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv:2501.02393v3: the form for
fine-tuning, Sparse-GIN-Attention. In every block, before its feed-forward,

    h = x + attention(x)                                       x: what the block reads
    E_ij = sigmoid(alpha (min(sum_heads A_ij, 1) - t))         0 where not above `cut`, or where i does not see j
    n = P h + p,  u_i = eps n_i + sum_j E_ij n_j,  v = W2 phi(W1 u + b1) + b2 + u
    h <- h + s RMSNorm(Q dropout(phi(v)) + q)

A are the attention weights of that layer. P, p, Q, q, W, b, eps, the norm, the slope of phi (one for both places) and s
train. Defaults are those of the author's example for Llama-3.2-3B, under which a pair is joined if its heads' weights
add up to more than 0.1405. s starts at 0 in the first block and rises linearly to 0.5 in the last, so that the output
does not start at the base's; `init="identity"` makes all of them 0.

Where we differ from the released code: it writes an edge from the query to the key and then keeps edges that point
forwards, so that of every causal graph the loops i -> i alone are left and no token hears of another. Here u_i sums
over j <= i; `self_loops_only` is the released graph. A is read without attention dropout, and a pair that no head
attends to is never joined, whatever the thresholds. Its soft any-head rule divides by 10, under which every pair is
joined; `tau` is 0.01. Its learned aggregation normalises over all keys, later ones too; ours is its other form, a
sigmoid.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tunesmith.core import attend
from tunesmith.core.adapter import Adapter, Below, Handle
from tunesmith.core.layer import LayerSpec
from tunesmith.core.modelmap import block_linears, depths, roles_from_names
from tunesmith.core.part import part
from tunesmith.errors import ModelError

_PHI = {"prelu": nn.PReLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
_MLP = 128
"""Hidden width of the learned aggregation."""
_WAS = "tunesmith_attention_was"


class _Pass:
    """What the running forward pass has shown of a block so far; a copy of the model starts without."""

    def __init__(self) -> None:
        self.heard: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # of the last child: input, output
        self.first = False  # whether the block itself was called, and not recomputed by activation checkpointing
        self.residual: Tensor | None = None
        self.edges: Tensor | None = None
        self.cache: Any = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


class _Unplug:
    """Takes a plug out; the last one gives the model its attention function back."""

    def __init__(self, model: Any, plugged: Handle) -> None:
        self.model, self.plugged = model, plugged

    def remove(self) -> None:
        self.plugged.remove()
        if not any(m.__dict__.get("tunesmith_plugs") for m in self.model.modules()):
            was = self.model.__dict__.pop(_WAS, None)
            if was is not None:
                self.model.set_attn_implementation(was)


@functools.cache
def _following(kind: Any) -> type:
    """A kind of cache layer whose nodes are reordered, cropped and dropped together with its keys."""

    def follow(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            getattr(kind, name)(self, *args, **kwargs)
            for nodes in self.tunesmith_nodes.values():
                getattr(nodes, name)(*args, **kwargs)

        return call

    moves = ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")
    return type(kind.__name__, (kind,), {"_layer_type": None, **{name: follow(name) for name in moves}})


@part(
    paper="arXiv:2501.02393",
    refuses={
        "padding-free": "its graph is read from the attention weights of each row, which attention over rows laid end "
        "to end does not show"
    },
)
class SparseGINAttention(Adapter):
    """The graph network of one block, held by the output layer of its self-attention.

    Args:
        layer: The output layer of a block's self-attention.
        aggregation: Of a pair's weights over the heads: their sum cut at 1, their mean, the sigmoid of a learned MLP
            of them, or "any", the largest sigmoid((A - threshold) / tau).
        alpha: Steepness of the sigmoid that makes weights of edges; 0 leaves the aggregate as it is.
        threshold: t, the aggregate at which the sigmoid is one half.
        cut: Edges that weigh no more are left out; 0 keeps every pair that attention sees.
        tau: Width of the soft step in "any".
        self_loops_only: No edges between tokens, as in the released code.
        causal: Whether edges come from earlier tokens alone; None asks the attention layer. A decoder is causal anyway.
        width: g, of the graph network; no projections if it is that of the model.
        hidden_multiplier: Width of the hidden layer, of `width`.
        epsilon: Start of eps.
        dropout: On what the graph network gives, and inside of the learned aggregation.
        activation: phi.
        init: "schedule" starts s between the next two; "identity" at 0.
        first_scale: s of the first block.
        last_scale: s of the last block.
    """

    neutral: ClassVar[Mapping[str, object]] = {"init": "identity"}

    def __init__(
        self,
        layer: LayerSpec,
        *,
        aggregation: Literal["sum", "mean", "mlp", "any"] = "sum",
        alpha: NonNegativeFloat = 10.0,
        threshold: NonNegativeFloat = 0.1,
        cut: Annotated[float, Field(ge=0, lt=1)] = 0.6,
        tau: PositiveFloat = 0.01,
        self_loops_only: bool = False,
        causal: bool | None = None,
        width: PositiveInt = 155,
        hidden_multiplier: PositiveFloat = 1.0,
        epsilon: float = 0.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        activation: Literal["prelu", "relu", "gelu", "tanh"] = "prelu",
        init: Literal["schedule", "identity"] = "schedule",
        first_scale: float = 0.0,
        last_scale: float = 0.5,
    ) -> None:
        super().__init__(layer)
        heaviest = 1 / (1 + math.exp(alpha * (threshold - 1))) if alpha else 1.0
        if heaviest <= cut:
            raise ModelError(
                f"sparse-gin-attention: with alpha={alpha} and threshold={threshold} an edge weighs at most "
                f"{heaviest:.3g}, so that none is above cut={cut}; lower `cut` or `threshold`"
            )
        self.aggregation, self.alpha, self.threshold, self.cut, self.tau = aggregation, alpha, threshold, cut, tau
        self.self_loops_only, self.causal = self_loops_only, causal
        self.scales = (first_scale, last_scale) if init == "schedule" else (0.0, 0.0)
        outer, hidden = layer.out_features, max(1, int(hidden_multiplier * width))
        new: dict[str, Any] = {"device": layer.device, "dtype": torch.float32}
        self.project = nn.Linear(outer, width, **new) if width != outer else nn.Identity()
        self.first = nn.Linear(width, hidden, **new)
        self.second = nn.Linear(hidden, width, **new)
        self.back = nn.Linear(width, outer, **new) if width != outer else nn.Identity()
        self.norm = nn.RMSNorm(outer, eps=1e-5, **new)
        self.phi = _PHI[activation](**(new if activation == "prelu" else {}))
        self.epsilon = nn.Parameter(torch.full((), epsilon, **new))
        self.scale = nn.Parameter(torch.zeros((), **new))  # `wire` knows the depth, and the heads for the MLP
        self.heads: nn.Sequential | None = None
        self.dropout = nn.Dropout(dropout)
        self.index: int | None = None
        self.run = _Pass()

    @classmethod
    def targets(cls, model: nn.Module) -> list[str]:
        """The output layer of the self-attention in every block."""
        return [name for name in block_linears(model) if _fits(name)]

    @property
    def looks(self) -> bool:
        """Whether `core.attend` is to show the weights."""
        return self.switched_on()

    def unmergeable(self) -> str:
        """Why: it is no change of a weight."""
        return "what it adds depends on all tokens of the row and on their attention; keep the adapter folder"

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        """Look at the block's attention, at what it reads, and at the children that may stand before it.

        Raises:
            ModelError: the layer is not the output of a block's self-attention.
        """
        names = [n for n, _ in model.named_parameters() if "tunesmith_" not in n]
        place = depths([*names, f"{path}.weight"])[f"{path}.weight"]
        if place is None or not _fits(path):
            raise ModelError(
                f"sparse-gin-attention stands on the output layer of a block's self-attention, which {path!r} is not; "
                "leave `target_modules` out"
            )
        first, last = self.scales
        with torch.no_grad():
            self.scale.fill_(first + (last - first) * place.index / max(1, place.count - 1))
        at = f"{place.stack}.{place.index}"
        attention: Any = model.get_submodule(_attention([n for n in names if n.startswith(f"{at}.")], path))
        if self.causal is None:
            self.causal = bool(getattr(attention, "is_causal", True))
        self.index = getattr(attention, "layer_idx", None)
        if self.aggregation == "mlp":
            wide = nn.Linear(attention.config.num_attention_heads, _MLP)
            mlp = nn.Sequential(wide, nn.ReLU(), nn.Dropout(self.dropout.p), nn.Linear(_MLP, 1))
            mlp.to(self.layer.device, torch.float32).requires_grad_(self.scale.requires_grad)
            self.heads = mlp.train(self.training)
        children = dict(_children(model.get_submodule(at), at))
        child = next(m for name, m in children.items() if f"{path}.".startswith(f"{name}."))
        before = attend.enable(model)
        if before not in (None, attend.NAME):
            model.__dict__[_WAS] = before
        return [
            model.get_submodule(at).register_forward_pre_hook(self._start),
            *(m.register_forward_hook(self._hear) for m in children.values() if m is not child),
            child.register_forward_pre_hook(self._enter, with_kwargs=True),
            _Unplug(model, attend.plug(attention, cast(Any, self))),
        ]

    def _start(self, block: nn.Module, args: tuple) -> None:
        if self.switched_on():
            self.run.heard, self.run.first = None, True

    def _hear(self, child: nn.Module, args: tuple, out: Any) -> None:
        # Of the children before the attention, the norm whose output it reads has read x. Only what the block itself
        # holds on to is compared, so that nothing is kept alive; hooks inside the block also run in a recomputation.
        if self.switched_on() and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            self.run.heard = weakref.ref(args[0]), weakref.ref(out)

    def _enter(self, child: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.switched_on():
            return
        run, given = self.run, args[0] if args else kwargs["hidden_states"]
        heard, first = run.heard, run.first
        run.heard, run.first, run.edges, run.cache = None, False, None, kwargs.get("past_key_values")
        run.residual = given
        if heard is not None and heard[1]() is given:
            run.residual = heard[0]()
        elif heard is not None and first:
            raise ModelError(
                f"sparse-gin-attention on {self.layer.name!r} cannot tell what the block adds its attention to: the "
                "attention does not read the output of the norm before it; attach adapters of norms first"
            )

    def before(self, query: Tensor, key: Tensor) -> None:
        """No keys of its own."""

    def look(self, probabilities: Tensor) -> None:
        """Take the graph of this pass from (B, heads, T, S)."""
        self.run.edges = self.edges(probabilities)

    def edges(self, probabilities: Tensor) -> Tensor:
        """E, (B, T, S) float32, of attention weights (B, heads, T, S); the last query is the last key."""
        A = probabilities.to(self.scale.dtype)
        if self.heads is not None:
            joined = torch.sigmoid(self.heads(A.movedim(1, -1)).squeeze(-1))
        elif self.aggregation == "any":
            joined = torch.sigmoid((A - self.threshold) / self.tau).amax(1)
        else:
            joined = A.mean(1) if self.aggregation == "mean" else A.sum(1).clamp(max=1)
        E = torch.sigmoid(self.alpha * (joined - self.threshold)) if self.alpha else joined
        kept = (A > 0).any(1) & (self.cut < E)  # what is masked has no weight at all
        T, S = A.shape[2:]
        j = torch.arange(S, device=A.device)
        i = j[S - T :, None]
        kept = kept & (i == j) if self.self_loops_only else kept & (j <= i) if self.causal else kept
        return torch.where(kept, E, 0.0)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """The layer's output and what the graph network adds to it, (B, T, out)."""
        y, run = below(x), self.run
        residual, edges, cache = run.residual, run.edges, run.cache
        run.residual = run.edges = run.cache = None
        if residual is None or edges is None:
            raise ModelError(
                f"sparse-gin-attention on {self.layer.name!r} was not shown the attention weights of this pass; it "
                "works inside of a transformers model whose attention goes through its attention interface"
            )
        n = self.project(residual.to(self.scale.dtype) + y.to(self.scale.dtype))
        u = self.epsilon * n + edges @ self._with_past(n, edges.shape[-1], cache)
        v = self.second(self.phi(self.first(u))) + u
        out = self.back(self.dropout(self.phi(v)))
        return y + (self.scale * self.norm(out)).to(y.dtype)

    def _with_past(self, n: Tensor, keys: int, cache: Any) -> Tensor:
        """The nodes of all keys, (B, S, g): those of earlier tokens are kept beside the keys in the cache."""
        known, sliding = n, False
        if cache is not None and self.index is not None:
            layer: Any = getattr(cache, "self_attention_cache", cache).layers[self.index]
            if not isinstance(layer, DynamicLayer):
                raise ModelError(
                    f"sparse-gin-attention keeps its nodes in a dynamic cache, not in a {type(layer).__name__}; leave "
                    "`cache_implementation` out, or set use_cache=False"
                )
            if not hasattr(layer, "tunesmith_nodes"):
                kind: Any = type(layer)
                layer.tunesmith_nodes, layer.__class__ = {}, _following(kind)
            nodes = layer.tunesmith_nodes.setdefault(id(self), DynamicLayer())
            known, sliding = nodes.update(n[:, None], n[:, None, :, :0])[0][:, 0], layer.is_sliding
        if known.shape[1] < keys or (known.shape[1] > keys and not sliding):
            raise ModelError(
                f"sparse-gin-attention: attention sees {keys} tokens, of which the graph knows {known.shape[1]}: the "
                "cache was filled without this adapter; start with an empty one, or set use_cache=False"
            )
        return known[:, -keys:]


def _fits(path: str) -> bool:
    """Whether a layer is the output of a self-attention, by its name."""
    crossing = any("cross" in w or "encdec" in w or w == "encoder_attn" for w in path.lower().split("."))
    return not crossing and roles_from_names([f"{path}.weight"])[f"{path}.weight"].kind == "o"


def _attention(names: list[str], path: str) -> str:
    """The module that computes the attention whose output layer stands at `path`: the nearest one with queries."""
    kinds, words = roles_from_names(names), path.split(".")

    def shared(name: str) -> int:
        same = [a == b for a, b in zip(words, name.split("."), strict=False)]
        return [*same, False].index(False)

    found = [n.rpartition(".")[0].removesuffix(".base_layer") for n in names if kinds[n].kind in ("q", "k", "qkv")]
    return max(found, key=shared).rpartition(".")[0] if found else path.rpartition(".")[0]


def _children(block: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """What the block calls itself: its children, and those of its lists."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _children(child, f"{path}.{name}")
        else:
            yield f"{path}.{name}", child
