"""SpIEL: sparse deltas whose places are chosen anew while they train: drop the smallest, grow where the gradient is.

Ansell, Vulić, Sterz, Korhonen and Ponti, "Scaling Sparse Fine-Tuning to Large Language Models", 2024 (SpIEL-AG).

    W' = W + scatter(values, indices),     every `interval` steps, per layer:
      drop   the floor(p k) smallest |value|;  p = 1 the first time, then `share` (1 - step / total)      (section 3.1)
      grow   as many of the candidates, those with the largest |sum of gradients over the window|

The candidates are the k entries with the largest |dL/dW'| in the first micro-batch of the window, the last `window`
steps before a choice; what is summed after that is their gradient alone. An entry that is dropped and grown is left as
it is. A grown entry begins with the value 0 and moments from what was seen: m = mean(g) (1 - b1^a) and
v = mean(g^2) (1 - b2^a) at age a = `window`, so that the bias correction gives the means (optimizer `aged-adamw`; with
torch's AdamW, which has one count for all entries, the same with that count).

Where we differ from the released code: gradients are added up per optimizer step, averaged over processes, so that
gradient accumulation and several processes choose what one process with the whole batch chooses (but for the
candidates, which one micro-batch names); no choice falls on the last step, after which nothing could learn; the density
of a layer is a share of its own entries, where the paper counts all parameters of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from torch import Tensor

from tunesmith.core.adapter import Step
from tunesmith.core.layer import LayerSpec
from tunesmith.core.part import part
from tunesmith.core.seeds import generator
from tunesmith.core.sparse_layer import SparseAdapter
from tunesmith.errors import RecipeError, TunesmithError

Share = Annotated[float, Field(gt=0, le=1)]


@part(
    paper="arXiv:2401.16405",
    tags=("mergeable", "sparse"),
    refuses={
        "fsdp": "the gradient of a whole weight is looked at, and a sharded one is not whole on any process",
    },
    implies={"optimizer": "aged-adamw"},
)
class SpIEL(SparseAdapter):
    """k values per layer at places that move.

    Args:
        layer: A linear or convolution layer, also quantised, or an embedding.
        density: k as a share of the layer's entries.
        interval: S, optimizer steps from one choice to the next.
        window: gamma, the number of steps before a choice whose gradients are summed.
        share: p, of the entries that are chosen anew, at the beginning of its decay.
        decay: Of p over the run: `linear`, `cosine`, or `constant`.
        first: p of the first choice; the places are random until then.
        seed: Of the places at the start.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    brisk: ClassVar[Mapping[str, object]] = {"density": 0.1, "interval": 2, "window": 1}

    def __init__(
        self,
        layer: LayerSpec,
        *,
        density: Share = 0.01,
        interval: PositiveInt = 20,
        window: PositiveInt = 5,
        share: Share = 0.2,
        decay: Literal["linear", "cosine", "constant"] = "linear",
        first: Share = 1.0,
        seed: int = 0,
    ) -> None:
        if window > interval:
            raise RecipeError(f"spiel: window={window} steps do not fit between choices every interval={interval}")
        size = torch.Size(layer.shape).numel()
        super().__init__(layer, max(int(density * size), 1))
        self.interval, self.window, self.share_, self.decay, self.first = interval, window, share, decay, first
        places = torch.randperm(size, generator=generator(seed, "spiel", layer.name))[: len(self.indices)]
        self.indices.copy_(places.sort().values)
        self.candidates: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    # The window -----------------------------------------------------------------------------------------------------

    def _into(self, step: int) -> int:
        """How far step `step` is into the window before the next choice: 1 for its first step, 0 and less outside."""
        return step % self.interval - (self.interval - self.window) + 1

    def begin_step(self, step: int) -> None:
        into = self._into(step)
        if into == 1:
            self.candidates, self.sums = None, {}
        self.watch = self._look if into >= 1 else None

    @torch.no_grad()
    def _look(self, dW: Tensor) -> None:
        """Take the gradient of one micro-batch at the candidates; of the window's first, choose them."""
        flat = dW.detach().reshape(-1)
        if self.candidates is None:
            # Loss and gradients are scaled by the number of processes, which then average: so is what is seen here.
            whole = _averaged(flat.float())
            self.candidates = whole.abs().sort(descending=True, stable=True).indices[: len(self.indices)].sort().values
            self.sums = {name: whole.new_zeros(len(self.candidates)) for name in ("step", "first", "second")}
        self.sums["step"] += flat[self.candidates].float()

    @classmethod
    def end(cls, adapters: Sequence[Self], step: Step) -> None:
        for made in adapters:
            made._end(step)

    @torch.no_grad()
    def _end(self, step: Step) -> None:
        self.watch = None
        if self._into(step.number) < 1 or self.candidates is None:
            return
        seen = _averaged(self.sums["step"])
        self.sums["first"] += seen
        self.sums["second"] += seen.square()
        self.sums["step"] = torch.zeros_like(seen)
        last = step.total is not None and step.number + 1 >= step.total
        if (step.number + 1) % self.interval or last:
            return
        if step.optimizer is None:
            raise TunesmithError(
                "spiel gives grown entries their moments: write `with tunesmith.step(model, n, total=STEPS, "
                "optimizer=optimizer):`"
            )
        self._choose(self._share(step), step.optimizer)
        self.candidates, self.sums = None, {}

    def _share(self, step: Step) -> float:
        if step.number < self.interval:
            return self.first
        if self.decay == "constant":
            return self.share_
        gone = step.number / step.needs_total("spiel")
        left = 1 - gone if self.decay == "linear" else (1 + torch.cos(torch.tensor(torch.pi * gone)).item()) / 2
        return self.share_ * left

    # The choice -----------------------------------------------------------------------------------------------------

    def _choose(self, share: float, optimizer: torch.optim.Optimizer) -> None:
        assert self.candidates is not None
        active = self.indices.long()
        dropped = torch.zeros(len(active), dtype=torch.bool, device=active.device)
        order = self.values.abs().sort(stable=True).indices
        dropped[order[: int(share * len(active))]] = True
        eligible = ~torch.isin(self.candidates, active[~dropped])
        best = torch.where(eligible, self.sums["first"].abs(), -1.0).sort(descending=True, stable=True).indices
        grown = best[: min(int(dropped.sum()), int(eligible.sum()))]
        returning = torch.isin(active, self.candidates[grown])  # dropped and grown: nothing happens to these
        fresh = grown[~torch.isin(self.candidates[grown], active)]
        leaving = order[(dropped & ~returning)[order]][: len(fresh)]  # the smallest, if there are fewer to grow
        indices, values = active.clone(), self.values.detach().clone()
        indices[leaving], values[leaving] = self.candidates[fresh], 0.0
        moments = self._moments(optimizer, leaving, fresh)
        sorted_ = self.place(indices, values)
        for key, value in moments.items():
            optimizer.state[self.values][key] = value[sorted_]

    def _moments(self, optimizer: torch.optim.Optimizer, places: Tensor, fresh: Tensor) -> dict[str, Tensor]:
        """What the optimizer keeps per entry, those at `places` begun anew.

        Raises:
            TunesmithError: the optimizer keeps something per entry that is not known here.
        """
        state = optimizer.state.get(self.values, {})
        kept = {key: t.clone() for key, t in state.items() if isinstance(t, Tensor) and t.shape == self.values.shape}
        unknown = kept.keys() - {"exp_avg", "exp_avg_sq", "step"}
        if unknown or (not kept and state):
            raise TunesmithError(
                f"spiel cannot move what {type(optimizer).__name__} keeps of its entries ({', '.join(state)}); take "
                "`aged-adamw`, or torch's Adam or AdamW"
            )
        if not kept:
            return {}
        group = next(g for g in optimizer.param_groups if any(p is self.values for p in g["params"]))
        b1, b2 = group["betas"]
        mean, square = (self.sums[name][fresh] / self.window for name in ("first", "second"))
        age: Any = self.window
        if type(optimizer).__name__ == "AgedAdamW":
            ages = kept.setdefault("step", torch.full_like(self.values, float(state["step"].max())))
            ages[places] = float(age)
        else:
            age = float(state["step"])
        kept["exp_avg"][places] = (mean * (1 - b1**age)).to(kept["exp_avg"].dtype)
        kept["exp_avg_sq"][places] = (square * (1 - b2**age)).to(kept["exp_avg_sq"].dtype)
        return kept

    # Between sessions -----------------------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.candidates is None else {"candidates": self.candidates, **self.sums}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.candidates = state["candidates"]
        self.sums = {name: state[name] for name in ("step", "first", "second")}


def _averaged(value: Tensor) -> Tensor:
    """The mean over processes; the same tensor where there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
