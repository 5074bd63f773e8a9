"""SPT: attention over few keys chosen by product codes, and a feed-forward of which each token uses half, under LoRA.

Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification", arXiv:2312.10365.

    every linear layer         W x + s B A x,   s = alpha / r;  A, B, the router's W_r and b_r train
    sparse attention           softmax over the L keys with the most codes in common with the query, L = n / 8
    routed feed-forward        p = sigmoid(W_r x + b_r); of G blocks of its neurons the G / 2 with the largest p,
                               h_g = phi(2 p_g (W1_g x + b1_g) + s B1_g A1 x),
                               y = b2 + sum_g (2 p_g W2_g h_g + s B2 A2_g h_g);  a gate is as W1

One codebook per layer, 16 codewords for every 8 numbers of a head, drawn from N(0, 1), serves queries and keys after
their rotation. For the first `codebook_steps` attention stays dense and the codewords learn by

    |soft - hard|^2 + |z - hard|^2,      hard: the nearest codeword in L1, soft: all of them weighted by 1 / distance

with an Adam of their own, over all tokens of a step that are no padding; then attention goes by the codes. The codes
have no gradient: what trains does so through the logits that are kept.

Where we differ from the released code. Its attention output, one row per head, is viewed as if heads came last, so that
numbers of other heads and of later tokens stand where a token's should; ours with L = n is dense attention. Its lookup
sorts counts into 4 buckets and never sees the padding mask; ours ranks exactly, of what the mask allows. It takes n of
256, 512 or 1024 and has no cache; here n is any, L is rounded up and counts a row's own tokens. It clamps logits to
[-10, 10]; we do not. Its codebook loss has weight 0.01 in the loss of all steps, with sparse attention from the first,
and pulls queries and keys too; ours moves codewords alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core import product_codes, routed
from tunesmith.core.adapter import Below, Handle, Step
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank
from tunesmith.core.part import part
from tunesmith.core.product_codes import Codebook, Selection, Sight
from tunesmith.core.surgery import Site
from tunesmith.errors import ModelError, RecipeError, TunesmithError


@part(
    paper="arXiv:2312.10365",
    refuses={
        "adapters": "layers of its feed-forwards give a token's blocks alone, which another adapter takes for all",
        "padding-free": "the keys that a query keeps follow from the length of its row, which rows end to end hide",
        "ist": "it turns the output of single layers down, and here those of a feed-forward only work together",
    },
)
class SPTSparsification(LowRank):
    """A LoRA whose output layer of attention selects keys, and whose feed-forward layers route tokens to blocks.

    Args:
        layer: A linear layer.
        rank: r.
        alpha: s = alpha / rank; the released code has s = 1.
        dropout: On the input of A while training.
        keys: L: at most 1, a share of the row's tokens, rounded up; above 1, a number. 0 leaves attention dense.
        ties: Of keys with as many equal codes, which are taken first.
        codewords: In a codebook, for each part of a head.
        subvector: Numbers of a head that make a part.
        codebook_steps: Steps before attention goes by the codes; below 1 a share of the run.
        codebook_every: From then on the codewords learn in one of so many steps; 0 for none. Released: 1.
        codebook_lr: Of the codewords' Adam.
        blocks: G, which divides the neurons of a feed-forward. 0 leaves feed-forwards dense.
        active: Blocks that a token uses; None for half of them.
        router: Start of W_r and b_r: "random" as `nn.Linear`, "even" at zero, where 2 p = 1.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    neutral: ClassVar[Mapping[str, object]] = {"keys": 1.0, "active": 4, "router": "even"}
    brisk: ClassVar[Mapping[str, object]] = {"codebook_steps": 2}
    feed: routed.Router | None = None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 16,
        alpha: PositiveFloat = 16.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        keys: NonNegativeFloat = 0.125,
        ties: Literal["first", "last"] = "first",
        codewords: Annotated[int, Field(ge=2, le=256)] = 16,
        subvector: PositiveInt = 8,
        codebook_steps: NonNegativeFloat = 0.1,
        codebook_every: NonNegativeInt = 0,
        codebook_lr: PositiveFloat = 2e-2,
        blocks: NonNegativeInt = 4,
        active: PositiveInt | None = None,
        router: Literal["random", "even"] = "random",
    ) -> None:
        active = max(1, blocks // 2) if active is None else active
        if (blocks and active > blocks) or (keys > 1 and keys != int(keys)):
            raise RecipeError(
                f"spt-sparsification: found active={active} of blocks={blocks} and keys={keys:g}; expected at most all "
                "blocks, and a share of keys up to 1 or a whole number of them"
            )
        super().__init__(layer, rank, dropout)
        self.alpha, self.keys, self.ties, self.blocks, self.active = alpha, keys, ties, blocks, active
        self.codewords, self.subvector, self.rate = codewords, subvector, codebook_lr
        self.codebook_steps, self.codebook_every, self.role = codebook_steps, codebook_every, routed.role(layer.name)
        self.router: routed.Router | None = None
        if blocks and self.role == "down":
            self.router = routed.Router(layer.out_features, blocks, active, router == "even", layer.device)
        self.codebook: Codebook | None = None  # `wire` knows the heads
        self.learns: int | None = None

    @classmethod
    def survey(cls, model: nn.Module, layers: Sequence[LayerSpec], options: Mapping[str, Any]) -> nn.Module | None:
        there = {routed.role(layer.name) for layer in layers}
        for option, role, what in (("keys", "o", "a self-attention"), ("blocks", "down", "a feed-forward")):
            if options[option] and role not in there:
                where = f"no layer among its targets is the output layer of {what}"
                raise ModelError(f"spt-sparsification: {where}; leave `target_modules` out, or set {option}=0")
        return routed.Plan(model) if options["keys"] or options["blocks"] else None

    def wire(self, model: nn.Module, path: str) -> Iterable[Handle]:
        """Find the other layers of the feed-forward; reach into the attention.

        Raises:
            ModelError: they cannot be told, are not adapted likewise, or do not divide into blocks or parts.
        """
        if self.unmergeable() is None:
            return ()
        plan = cast(routed.Plan, self.shared)
        stack = model.get_submodule(path).tunesmith_adapters[self.group]
        if len(stack) > 1:
            raise ModelError(
                f"spt-sparsification on {path!r} must be alone in its stack: layers of its feed-forwards give a "
                "token's blocks alone, which another adapter takes for all"
            )
        if self.blocks and self.role in ("up", "gate", "down"):
            self._join_feed_forward(model, plan.site(path))
        if self.keys and self.role == "o":
            return [self._enter_attention(model, plan.site(path))]
        return ()

    def _join_feed_forward(self, model: nn.Module, site: Site) -> None:
        found = {name: _ours(model, name, self.group) for name in (*site.inputs, site.output)}
        last = found[site.output]
        if last is None or None in found.values():
            missing = next(name for name, made in found.items() if made is None)
            raise ModelError(
                f"spt-sparsification: the layers of a feed-forward are routed together, and {missing!r} is not among "
                "its targets; leave `target_modules` out, or set blocks=0"
            )
        routed.check(model, site, self.blocks)
        if last is not self:
            self.__dict__["feed"] = last.router  # not a submodule of this one

    def _enter_attention(self, model: nn.Module, site: Site) -> Handle:
        if site.size % self.subvector:
            fits = [n for n in range(1, site.size + 1) if site.size % n == 0]
            raise ModelError(
                f"spt-sparsification: heads of {site.size} numbers at {site.output!r} do not divide into parts of "
                f"subvector={self.subvector}; take one of {fits}"
            )
        self.codebook = Codebook(site.size, self.subvector, self.codewords, self.layer.name, self.layer.device)
        return product_codes.plug(model, model.get_submodule(site.inputs[0].rpartition(".")[0]), self)

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        """Dense attention and learning codewords before `codebook_steps`, codes from then on."""
        n, every, selecting = adapters[0].codebook_steps, adapters[0].codebook_every, adapters[0].keys > 0
        until = int(n)
        if selecting and 0 < n < 1:
            total = step.needs_total("spt-sparsification")
            until = min(max(1, int(n * total)), total - 1)
        if selecting and step.total is not None and until >= step.total:
            raise TunesmithError(
                f"spt-sparsification: codebook_steps={n:g} leaves none of the {step.total} steps of the run for "
                "sparse attention; give fewer, or a share of the run (below 1)"
            )
        dense = step.number < until
        learning = dense or bool(every and (step.number - until) % every == 0)
        for made in adapters:
            if made.codebook is not None:
                made.codebook.used.fill_(not dense)
                made.learns = step.number if learning else None

    @classmethod
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        """Move the codewords."""
        for made in adapters:
            made.learns = None
        product_codes.update([made.codebook for made in adapters if made.codebook is not None], adapters[0].rate)

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.codebook is None else self.codebook.training_state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        if self.codebook is not None:
            self.codebook.load_training_state(state)

    def select(self, query: Tensor, key: Tensor, sight: Sight) -> Selection | None:
        """What `core.product_codes` asks: learn from this pass if it is due, and say which keys to keep."""
        book = cast(Codebook, self.codebook)
        if self.learns is not None and self.training and sight.queries == sight.keys:
            seen = sight.seen()
            book.learn(query, key, None if seen is None else seen.any(1).expand(len(query), -1), self.learns)
        return Selection(book, self.keys, latest=self.ties == "last") if book.used else None

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.alpha / self.rank

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """The layer's output; from the first layers of a routed feed-forward that of a token's blocks, side by side."""
        B, A, scale = self.factors()
        dropped = x if self.dropout is None else self.dropout(x)
        if self.feed is not None:
            way = self.feed(x)
            low = routed.into_blocks(routed.project(dropped, A), scale * B, None, way, weighted=False)
            out = routed.into_blocks(x, below.weight, below.bias, way)
        elif self.router is not None:
            way = self.router.take(x.shape[:-1].numel())
            low = routed.project(routed.out_of_blocks(dropped, A, way, weighted=False), scale * B)
            out = routed.out_of_blocks(x, below.weight, way)
            out = out if below.bias is None else out + below.bias.to(out.dtype)
        else:
            return super().forward(x, below)
        return out + low.to(out.dtype)

    def unmergeable(self) -> str | None:
        """Why it cannot be folded into weights, unless neither attention nor feed-forwards are sparse."""
        if not self.keys and not self.blocks:
            return None
        return (
            "its LoRA is a change of weights, but the keys and blocks that a token uses are chosen anew for each; keep "
            "the adapter folder beside the model"
        )

    def weight(self, W: Tensor) -> Tensor:
        if reason := self.unmergeable():
            raise ModelError(f"SPTSparsification on {self.layer.name!r} is no change of a weight: {reason}")
        return super().weight(W)

    def to_lora(self) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        return None if self.unmergeable() else super().to_lora()


def _ours(model: nn.Module, name: str, group: str) -> SPTSparsification | None:
    held: Any = getattr(model.get_submodule(name), "tunesmith_adapters", {})
    return next((m for m in held[group] if isinstance(m, SPTSparsification)), None) if group in held else None
