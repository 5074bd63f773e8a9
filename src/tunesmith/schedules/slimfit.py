"""SlimFit: a tenth of the weight tensors trains in each step, those that moved most, and autograd keeps less.

Ardakani, Haan, Tan, Popovici, Cheung, Iancu and Sen, "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models
Using Training Dynamics", NAACL 2024 (inter-layer scheduling, ILS, Fig. 3; quantisation and pruning of activations).

    every step:   of t weight tensors the floor(F t) with the smallest d rest, the others train, as do all biases
    afterwards:   d_i = mean_j |W_ij(new) - W_ij(old)| / (|W_ij(old)| + eps)   for those that have trained
    at first:     d_i = 1e7 U(0, 1), and what has not trained yet goes before what has

A linear layer whose weight rests needs no input in the backward pass. What is needed whatever rests is kept compressed
(`core/compact.py`): the input of GELU in 4 bits, that of trained linear layers and the factors of attention in 8,
softmax outputs in 8, of resting norms a tenth of the normalised output. Forward values are the plain ones, to the bit.

The tensors that train are copied when `optimizer.step()` begins, and the copies dropped when it ends. Where we differ
from the released code: that holds copies of all tensors at all times; divides by weights that may be zero; has the
norms inside the blocks as candidates, here all norms are; gives the LayerNorm gradient an epsilon of 1e-12 whatever the
layer's; and keeps probabilities with 4 bits behind the point, where all vanish if 33 tokens share a head's attention,
beside a full copy for softmax's own gradient: here both use one copy with 8. It also compresses the input of the MLP's
second layer alone: `linear="wide"`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import floor
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from tunesmith.core.compact import Fixed
from tunesmith.core.compact_mode import Settings
from tunesmith.core.compact_model import Compaction
from tunesmith.core.modelmap import roles
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.core.seeds import generator
from tunesmith.errors import CheckpointError, TunesmithError

Bits = Literal[4, 8]


@part(
    paper="arXiv:2305.18513",
    refuses={"fsdp": "what trains of a sharded weight cannot change from step to step"},
)
class SlimFit(Schedule):
    """Weight tensors chosen in every step by how far they moved when they last trained, with compressed activations.

    Candidates are all matrices, embeddings and kernels and the weights of norms, adapters' included. Everything else
    trains always: biases, other vectors, and a new head.

    Args:
        frozen: F, the share of the candidates that rests; rounded down. 0.9 for most, 0.95 for large data, 0.75 where
            accuracy suffers (the paper's).
        compress: Whether what autograd keeps is compressed. `torch.compile` gives up where it is: False for that.
        classifier: Whether the head of a classifier takes turns too (the paper's BERT) instead of training always (its
            ViT). The head of a language model, which is pre-trained, always takes turns.
        gelu_bits: Of the inputs of GELU and SiLU, -4 to 3.5 for 4 bits. ReLU keeps one exact bit whatever is said here.
        operand_bits: Of the inputs of linear layers and the factors of attention and of a gated MLP, -8 to 7.94.
        softmax_bits: Of softmax outputs, in steps of 2^-bits.
        scaling: `fixed` is the paper's: the ranges above for every model. `rows` gives each row of a linear layer's
            input, of a factor and of softmax an exponent of its own, for a byte: for models whose numbers are of other
            sizes than BERT's and ViT's, such as gated MLPs, and for eager attention over hundreds of tokens.
        linear: `all` compresses the input of every linear layer that trains, `wide` only of those with more inputs than
            outputs, as the released code does to even out what the layers need.
        kept: Share of the normalised outputs that a resting norm keeps.
        eps: Added to |W| in the scores: a number that was zero would else make its tensor the first for ever.
        keep_state: Whether what rests keeps its optimizer state, stale as it is (the released code's). Without, state
            is that of what trains, but Adam begins anew nearly every time.
        seed: Of the first order.
    """

    brisk: ClassVar[Mapping[str, object]] = {}

    def __init__(
        self,
        *,
        frozen: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        compress: bool = True,
        classifier: bool = False,
        gelu_bits: Bits = 4,
        operand_bits: Bits = 8,
        softmax_bits: Bits = 8,
        scaling: Literal["fixed", "rows"] = "fixed",
        linear: Literal["all", "wide"] = "all",
        kept: Annotated[float, Field(gt=0, le=1)] = 0.1,
        eps: PositiveFloat = 1e-8,
        keep_state: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.frozen, self.compress, self.classifier = frozen, compress, classifier
        self.eps, self.keeps_state, self.seed = eps, keep_state, seed
        rows = scaling == "rows"
        operand, probability = Fixed(operand_bits, 3, rows=rows), Fixed(softmax_bits, 0, signed=False, rows=rows)
        self.settings = Settings(Fixed(gelu_bits, 2), operand, probability, kept, linear)
        self.candidates: list[str] = []
        """Names of the tensors that take turns."""
        self.scores = torch.zeros(0, dtype=torch.float64)
        """d of each."""
        self.visits = torch.zeros(0, dtype=torch.int64)
        """Steps in which each has trained."""
        self._sweep: list[int] = []
        self._now: list[int] = []
        self._before: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._compaction: Compaction | None = None

    def on_attach(self) -> None:
        """Find the candidates, give them their first scores, and begin to compress.

        Raises:
            TunesmithError: nothing that trains is a candidate.
        """
        assert self.model is not None
        assert self.optimizer is not None
        self._let_go()
        known, always = roles(self.model), set() if self.classifier else _new_heads(self.model)
        self.candidates = [
            name
            for name, p in self.eligible.items()
            if name not in always and (p.dim() > 1 or (known[name].kind == "norm" and not known[name].bias))
        ]
        count = len(self.candidates)
        if not count:
            raise TunesmithError(
                f"slimfit: weight tensors take turns in training, but the {len(self.eligible)} parameters of "
                f"{type(self.model).__name__} that train are biases, other vectors or a new head, which always train; "
                "let matrices or norms train too, or leave the schedule out"
            )
        self.scores = 1e7 * torch.rand(count, dtype=torch.float64, generator=generator(self.seed, "slimfit"))
        self.visits = torch.zeros(count, dtype=torch.int64)
        self._sweep, self._now = self._order(), []
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._remember()),
            self.optimizer.register_step_post_hook(lambda *_: self._score()),
        ]
        if self.compress:
            self._compaction = Compaction(self.model, self.settings)

    @property
    def training(self) -> int:
        """Candidates that train in a step: t - floor(F t)."""
        count = len(self.candidates)
        return max(1, count - floor(self.frozen * count + 1e-9))  # 0.29 * 100 is a little below 29

    def _order(self) -> list[int]:
        scores, visits = self.scores.tolist(), self.visits.tolist()
        return sorted(range(len(scores)), key=lambda i: (visits[i] > 0, -scores[i], i))

    def chosen(self, step: int) -> list[int]:
        """The candidates that train in a step under the scores of now, ascending."""
        share = self.training
        # Nothing is known in the first sweep: it follows the step alone, also after a step that was not taken.
        order = self._sweep[share * step :] if share * (step + 1) <= len(self._sweep) else self._order()
        return sorted(order[:share])

    def active(self, step: int) -> Collection[str]:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._agree()
        self._now = self.chosen(step)
        return (self.eligible.keys() - set(self.candidates)).union(self.candidates[i] for i in self._now)

    def _agree(self) -> None:
        """The scores of the first process for all: the last bit of a mean may differ between machines."""
        held = torch.stack([self.scores, self.visits.double()]).to(self.eligible[self.candidates[0]].device)
        dist.broadcast(held, src=0)
        self.scores, self.visits = held[0].cpu(), held[1].cpu().long()

    def _remember(self) -> None:
        self._before = {i: self.eligible[self.candidates[i]].detach().clone() for i in self._now}

    @torch.no_grad()
    def _score(self) -> None:
        for i, old in self._before.items():
            new = self.eligible[self.candidates[i]].detach()
            moved = (new.float() - old.float()).abs_().div_(old.float().abs_().add_(self.eps))
            self.scores[i] = float(moved.mean())
            self.visits[i] += 1
        self._before = {}

    def movement(self) -> list[dict[str, str | float]]:
        """What was learned, as plain data: one row per candidate, in the order of the model.

        Returns:
            `parameter`, its name; `score`, d after the last step in which it trained; `steps`, in how many it trained.
            A score without steps is the random one of the start.
        """
        rows = zip(self.candidates, self.scores.tolist(), self.visits.tolist(), strict=True)
        return [{"parameter": name, "score": score, "steps": steps} for name, score, steps in rows]

    def training_state(self) -> dict[str, Tensor]:
        """Scores and visits; the first sweep depends on the seed alone."""
        return {"scores": self.scores.clone(), "visits": self.visits.clone()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over scores and visits.

        Raises:
            CheckpointError: they are of another number of candidates.
        """
        if state["scores"].shape != self.scores.shape:
            raise CheckpointError(
                f"slimfit: the checkpoint has scores of {len(state['scores'])} tensors, but {len(self.candidates)} "
                "take turns here; resume with the same model, adapters and `classifier`"
            )
        self.scores = state["scores"].detach().to("cpu", torch.float64, copy=True)
        self.visits = state["visits"].detach().to("cpu", torch.int64, copy=True)

    def detach(self) -> None:
        """Let everything train again, and compress nothing."""
        self._let_go()
        super().detach()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._compaction is not None:
            self._compaction.remove()
        self._hooks, self._compaction, self._before = [], None, {}


def _new_heads(model: nn.Module) -> set[str]:
    """Weights of the heads of a model that predicts no tokens: they are new, the head of a language model is not."""
    vocabulary = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return set() if vocabulary is not None else {name for name, role in roles(model).items() if role.kind == "head"}
