"""MHR: a shared inventory of LoRAs that each task mixes in its own way, block by block of the dimensions.

Caccia, Ponti, Su, Pereira, Le Roux and Sordoni, "Multi-Head Adapter Routing for Cross-Task Generalization", NeurIPS
2023. With one block it is Poly (Ponti et al., "Combining Modular Skills in Multitask Learning", arXiv:2202.13914).

    w_t[q, s] = sigma(Z_t[q, s]) / sum_s' sigma(Z_t[q, s'])             task t, block q of h, skill s of m
    A_t = concat_q sum_s w_t[q, s] A_s[:, block q],   B_t likewise over blocks of the output, with the same w
    y += (alpha / r) B_t A_t x

In training sigma(Z) may be a relaxed Bernoulli, sigma(Z + log u - log(1 - u)) with u uniform. On a new task MHR trains
a new row of Z with A and B; MHR-z that row alone; MHR-mu an ordinary LoRA, the mean of the A's and the mean of the B's
(which is not the mean of the products).

Where we differ from released code (mttl, peft's Poly): sizes that h does not divide have shorter last blocks, there an
error. A skill's A starts as a LoRA's, uniform to 1/sqrt(in); peft's is sqrt(h) larger. alpha is 1 there: a factor of 1
for T0 (rank 1), 1/16 for Super-NaturalInstructions (rank 16); here 1. A draw holds for a task, layer and step, there
for a row: processes, micro-batches, recomputed activations and resumed runs agree. Rows of no known task take the mean
of the tasks' w; there an error, or for -1 the last task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core import side
from tunesmith.core.adapter import Adapter, Below, Step
from tunesmith.core.layer import LayerSpec
from tunesmith.core.lowrank import LowRank, matrix_shape
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.core.stats import Loss, model_loss
from tunesmith.core.steps import in_force
from tunesmith.errors import DataError, ModelError, RecipeError, TunesmithError, did_you_mean

Variant = Literal["mhr", "z"]


@part(
    paper="arXiv:2211.03831",
    tags=("mergeable", "low-rank"),
    refuses={
        "padding-free": "rows laid end to end are one row, and each row of a batch is mixed for its own task",
        "adapters": "each row of a batch has its own change, and another adapter on a layer may want one for all",
    },
)
class MultiHeadRouting(LowRank):
    """LoRAs mixed per task and block.

    Args:
        layer: A linear or convolution layer; a convolution's blocks are those of its flattened kernel.
        rank: r, of each skill.
        skills: m, the LoRAs in the inventory; 1 is a plain LoRA.
        splits: h, the blocks that are routed apart; 1 is Poly.
        groups: Names of the tasks. A run takes them from the rows' `family` column.
        alpha: The factor in front is alpha / r.
        routing: In training: `bernoulli` draws, or `sigmoid` as in evaluation.
        variant: `mhr` trains everything, `z` the routing of the last group alone (see `add_task`).
        router_lr: Learning rate of Z as a multiple of the run's; released runs have 0.1 beside 1e-3.
        seed: Of the draws and of what `add_task` adds.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    side: ClassVar[tuple[str, ...]] = (side.GROUP,)
    Z: Tensor
    Z_kept: Tensor | None

    def __init__(
        self,
        layer: LayerSpec,
        *,
        rank: PositiveInt = 16,
        skills: PositiveInt = 8,
        splits: PositiveInt = 8,
        groups: list[str] | None = None,
        alpha: PositiveFloat = 16.0,
        routing: Literal["bernoulli", "sigmoid"] = "bernoulli",
        variant: Variant = "mhr",
        router_lr: PositiveFloat = 100.0,
        seed: int = 0,
    ) -> None:
        Adapter.__init__(self, layer)
        self.groups = ["all"] if groups is None else groups
        if not self.groups or len(set(self.groups)) < len(self.groups):
            raise RecipeError(f"multi-head-routing: `groups` names each task once; found {self.groups}")
        if splits > (most := min(matrix_shape(layer))):
            raise ModelError(
                f"multi-head-routing with {splits} splits needs as many dimensions; {layer.name!r} of shape "
                f"{tuple(layer.shape)} has {most}. Lower `splits` or leave the layer out of `target_modules`."
            )
        self.skills, self.splits, self.variant = skills, splits, variant
        self.alpha, self.routing, self.router_lr, self.seed = alpha, routing, router_lr, seed
        self.dropout = None
        self.chosen: int | None = None
        self.drawn: Tensor | None = None
        self.resize(rank)

    def resize(self, rank: int) -> None:
        out_features, in_features = matrix_shape(self.layer)
        self.rank = rank
        A = torch.empty(self.skills, rank, in_features, device=self.layer.device)
        for skill in A:
            nn.init.kaiming_uniform_(skill, a=5**0.5)
        Z = A.new_empty(len(self.groups), self.splits, self.skills).uniform_(-1e-3, 1e-3)
        self.hold(A, A.new_zeros(self.skills, rank, out_features), Z)

    def hold(self, A: Tensor, B: Tensor, Z: Tensor) -> None:
        """Take (skills, r, in), (skills, r, out), (groups, splits, skills); what does not train becomes a buffer."""
        kept = len(Z) - 1 if self.variant == "z" else 0
        learns = {"A": self.variant == "mhr", "B": self.variant == "mhr", "Z": self.skills > 1}
        for name, value in {"A": A, "B": B, "Z": Z[kept:], "Z_kept": Z[:kept]}.items():
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            value = value.detach().clone()
            if learns.get(name):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value if len(value) else None)

    @property
    def has_steps(self) -> bool:
        return self.skills > 1 and (self.routing == "bernoulli" or self.variant == "z")

    def lr_ratios(self) -> Mapping[str, float]:
        """The router's own learning rate."""
        return {"Z": self.router_lr} if self.skills > 1 and self.router_lr != 1 else {}

    @classmethod
    def begin(cls, adapters: Sequence[Self], step: Step) -> None:
        if all(made.variant == "z" and not bool(made.B.any()) for made in adapters):
            raise ModelError(
                "multi-head-routing: the variant `z` mixes what was learned, and B is zero everywhere; train with "
                "`mhr` on some tasks first, then `add_task(model, name, 'z')`"
            )
        super().begin(adapters, step)

    def begin_step(self, step: int) -> None:
        if self.routing == "bernoulli":
            g = generator(self.seed, "multi-head-routing", self.layer.name, step)
            u = torch.rand(len(self.groups), self.splits, self.skills, generator=g)
            self.drawn = torch.logit(u, eps=torch.finfo(u.dtype).eps).to(self.Z.device)

    def end_step(self) -> None:
        self.drawn = None

    def logits(self) -> Tensor:
        """Z of all groups, (groups, splits, skills)."""
        return self.Z if self.Z_kept is None else torch.cat([self.Z_kept, self.Z])

    def weights(self) -> Tensor:
        """w of all groups and, in the last row, their mean: (groups + 1, splits, skills); skills add up to 1."""
        Z = self.logits()
        if self.training and self.drawn is not None:
            Z = Z + self.drawn
        w = F.logsigmoid(Z).softmax(-1)  # sigma / sum sigma, also where every sigma underflows
        return torch.cat([w, w.mean(0, keepdim=True)])

    def deploy(self, *, task: str | None) -> None:  # type: ignore[override]
        """As `choose`, for one layer: `tunesmith export --set task=NAME`."""
        if task is not None and task not in self.groups:
            known = f"Its tasks: {', '.join(self.groups)}."
            raise TunesmithError(f"multi-head-routing knows no task {task!r}.{did_you_mean(task, self.groups)} {known}")
        self.chosen = None if task is None else self.groups.index(task)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        w = self.weights()[-1 if self.chosen is None else self.chosen][None]
        return mixed(self.B, w)[0].T, mixed(self.A, w)[0], self.alpha / self.rank

    def forward(self, x: Tensor, below: Below) -> Tensor:
        index = self._index(len(x))
        if index is None:
            return super().forward(x, below)
        if self.layer.kind == "conv":
            return self._by_task(x, below, index.repeat_interleave(len(x) // len(index)))
        w = self.weights().index_select(0, index)
        out = below(x)
        # After a row of the batch come its beams, or its tokens where a model (OPT) flattens them.
        x = x.to(self.A.dtype).reshape(len(index), -1, x.shape[-1])
        change = x @ mixed(self.A, w).mT @ mixed(self.B, w)
        return out + (self.alpha / self.rank * change).reshape(out.shape).to(out.dtype)

    def _index(self, rows: int) -> Tensor | None:
        """The row of `weights()` for each entry of the side information; None if there is none."""
        if self.side_context is None or self.side_context.get(side.GROUP, rows) is None:
            return None
        index: Tensor = self.side_context.values[side.GROUP]
        # Elsewhere than on a CPU this would wait for the device, and `index_select` stops there as well.
        if index.device.type == "cpu" and not bool(((index >= side.UNKNOWN) & (index < len(self.groups))).all()):
            known = f"0 to {len(self.groups) - 1} ({', '.join(self.groups)}), and {side.UNKNOWN} for any other"
            raise DataError(f"multi-head-routing knows the groups {known}; `group` is {index.tolist()}")
        index = index.to(self.Z.device)
        return torch.where(index == side.UNKNOWN, len(self.groups), index)

    def _by_task(self, x: Tensor, below: Below, index: Tensor) -> Tensor:
        """The rows of one task at a time, all with one kernel."""
        before, parts, order = self.chosen, list[Tensor](), list[Tensor]()
        try:
            for self.chosen in index.unique().tolist():
                order.append((index == self.chosen).nonzero()[:, 0])
                parts.append(super().forward(x[order[-1]], below))
        finally:
            self.chosen = before
        return torch.cat(parts)[torch.cat(order).argsort()]


def mixed(inventory: Tensor, w: Tensor) -> Tensor:
    """The inventory mixed block by block, (n, r, d), from (m, r, d) and w, (n, h, m)."""
    m, r, d = inventory.shape
    size = -(-d // w.shape[1])
    blocks = F.pad(inventory, (0, size * w.shape[1] - d)).view(m, r, -1, size)
    return torch.einsum("nhm,mrhd->nrhd", w.to(inventory.dtype), blocks).flatten(2)[..., :d]


def choose(model: nn.Module, task: str | None) -> int:
    """Mix for one task where a batch names none, and in merging and export; None (the default) for the mean of all.

    Returns the number of layers; raises a TunesmithError if there is no such task.
    """
    for made in (found := _layers(model)):
        made.deploy(task=task)
    return len(found)


def add_task(model: nn.Module, task: str, variant: Variant = "mhr") -> int:
    """A row of Z near zero for a new task, the last of `groups`. To be called before an optimizer is made.

    `mhr` trains everything from now on, `z` the new row alone. The PEFT config is kept true. Returns the number of
    layers; raises a TunesmithError if the task is known, or there is nothing to mix.
    """
    for made in (found := _layers(model)):
        if task in made.groups or (variant == "z" and made.skills == 1):
            reason = "it knows that" if task in made.groups else "one skill leaves nothing to mix"
            raise TunesmithError(f"multi-head-routing cannot add the task {task!r} as {variant!r}: {reason}")
        g = generator(made.seed, "multi-head-routing", made.layer.name, task)
        row = 1e-3 * (2 * torch.rand(1, made.splits, made.skills, generator=g) - 1)
        Z = torch.cat([made.logits(), row.to(made.Z.device)])
        made.groups, made.variant = [*made.groups, task], variant
        made.hold(made.A, made.B, Z)
    return _written(model, found)


def average(model: nn.Module) -> int:
    """MHR-mu: the mean of the A's and of the B's in place of the inventory, a LoRA of rank r for all tasks.

    To be called before an optimizer is made. The PEFT config is kept true. Returns the number of layers.
    """
    for made in (found := _layers(model)):
        made.skills, made.splits, made.variant = 1, 1, "mhr"
        made.hold(made.A.mean(0, True), made.B.mean(0, True), made.Z.new_zeros(len(made.groups), 1, 1))
    return _written(model, found)


def _layers(model: nn.Module) -> list[MultiHeadRouting]:
    return [made for made in in_force(model) if isinstance(made, MultiHeadRouting)]


def _written(model: nn.Module, changed: list[MultiHeadRouting]) -> int:
    """Make the PEFT configs say what the layers are, so that what is saved can be loaded."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    for made in changed:
        for entry in configs[made.group].parts if made.group in configs else []:
            if entry["name"] == "multi-head-routing":
                entry["options"] |= {name: getattr(made, name) for name in ("groups", "variant", "skills", "splits")}
    return len(changed)


def gradient_alignment(model: nn.Module, batches: Mapping[str, Mapping[str, Any]], *, loss: Loss = model_loss) -> float:
    """Mean cosine between two tasks' gradients over all pairs: how far learning one helps another.

    Of what trains except routers, in evaluation mode, of any model; layers of this part are told the task.

    Args:
        model: Left as it is.
        batches: One for each task, by name, as keyword arguments of the model.
        loss: `(model, batch) -> scalar`.

    Raises:
        TunesmithError: there are fewer than two tasks, or one has no gradient.
    """
    routed, was = _layers(model), model.training
    trained = [p for p in model.parameters() if p.requires_grad and all(p is not made.Z for made in routed)]
    directions = []
    try:
        for task, batch in batches.items():
            beside = {side.GROUP: side.indices(routed[0].groups, [task])} if routed else {}
            with side.side(model.eval(), **beside):
                found = torch.autograd.grad(loss(model, batch), trained, materialize_grads=True)
            directions.append(F.normalize(torch.cat([g.flatten().float() for g in found]), dim=0))
    finally:
        model.train(was)
    if len(directions) < 2 or not all(bool(d.any()) for d in directions):
        raise TunesmithError(f"an alignment is one of gradients of two tasks or more, none zero; found {[*batches]}")
    cosines = [float(one @ other) for one, other in combinations(directions, 2)]
    return sum(cosines) / len(cosines)
