"""What Light-PEFT does between its two trainings: score an estimated model, decide what stays, cut the rest out.

Also without the pipeline, in a loop of one's own:

    plan = decide(score(model, batches), Cuts())
    smaller = reduce(model, plan)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.lowrank import LowRank, low_rank
from tunesmith.core.surgery import Structure, prune, sites
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.errors import ModelError

Scores = Mapping[str, Tensor]
"""By layer, float32: `heads/LAYER` (units,) with `share/LAYER` (), the heads per unit; `neurons/LAYER` (neurons,);
`module/LAYER` () and `rank/LAYER` (r,)."""


@dataclass(frozen=True)
class Cuts:
    """Shares to remove: heads within each layer, neurons over all, adapters over all, ranks of the adapters left."""

    heads: float = 1 / 3
    neurons: float = 1 / 3
    modules: float = 0.75
    ranks: float = 0.5


def _layers(model: nn.Module) -> dict[str, tuple[TunesmithLayer, LowRank | None, StructureMasks | None]]:
    """Layers that have adapters, with the low-rank one and the masks.

    Raises:
        ModelError: no low-rank adapter is there, or one whose components cannot be taken out one by one.
    """
    found = {}
    for layer in (m for m in model.modules() if isinstance(m, TunesmithLayer)):
        low = next((made for made in layer.active() if isinstance(made, LowRank)), None)
        masks = next((made for made in layer.active() if isinstance(made, StructureMasks)), None)
        if low is not None and low.to_lora()[1].shape != low.A.shape:
            raise ModelError(
                f"{type(low).__name__} on {layer.spec.name!r} is more than the product of its factors; light-peft cuts "
                "columns of B and rows of A. Take another `adapter`, such as `eva`."
            )
        found[layer.spec.name] = (layer, low, masks)
    if not any(low for _, low, _ in found.values()):
        raise ModelError("light-peft needs a low-rank adapter with factors A and B on the model; it has none")
    return found


def score(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How much heads, neurons, adapters and ranks matter.

    Args:
        model: With `structure-masks` above a low-rank adapter, as the estimation left them. Evaluation mode.
        batches: Keyword arguments of the model, labels included.
    """
    layers = _layers(model)
    masked = {name: masks for name, (_, _, masks) in layers.items() if masks}
    found = {f"{masks.of}/{name}": masks.factors.detach().abs().cpu() for name, masks in masked.items()}
    known = sites(model.get_base_model() if isinstance(model, PeftModel) else model)
    found |= {f"share/{n}": torch.tensor(known[n].share) for n, masks in masked.items() if masks.of == "heads"}
    lows = {name: low for name, (_, low, _) in layers.items() if low}
    modules = {name: torch.zeros((), dtype=torch.float64) for name in lows}
    ranks = {name: torch.zeros(low.rank, dtype=torch.float64) for name, low in lows.items()}
    real: Tensor | None = None

    @torch.no_grad()
    def read(layer: TunesmithLayer, args: tuple) -> None:
        _, low, masks = layers[layer.spec.name]
        if low is None:
            return
        x = args[0] if masks is None else args[0] * masks.columns().to(args[0].dtype)
        B, A, scale = low.factors()
        change, base = low_rank(x, A, B, scale).norm(dim=-1), layer.get_base_layer()(x).norm(dim=-1)
        ratio = torch.where(base > 0, change.float() / base.float(), 0.0)
        # Some architectures lay the rows of a batch end to end before their feed-forward layers.
        fits = real is not None and real.numel() == ratio.numel()
        kept = ratio.flatten()[real.flatten()] if real is not None and fits else ratio
        modules[layer.spec.name] += kept.mean().double().cpu() / len(batches)

    handles = [layer.register_forward_pre_hook(read) for layer, _, _ in layers.values()]
    try:
        parameters = [p.requires_grad_() for low in lows.values() for p in (low.A, low.B)]
        for batch in batches:
            mask = batch.get("attention_mask")
            real = None if mask is None else mask.bool()
            slopes = iter(torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True))
            for name, low in lows.items():
                for p, slope, dim in ((low.A, next(slopes), 1), (low.B, next(slopes), 0)):
                    if slope is not None:
                        ranks[name] += (p.detach() * slope).double().mean(dim).abs().cpu() / len(batches)
    finally:
        for handle in handles:
            handle.remove()
    found |= {f"module/{name}": value for name, value in modules.items()}
    return {name: value.float() for name, value in (found | {f"rank/{n}": v for n, v in ranks.items()}).items()}


def staying(scores: Tensor, share: float, place: Tensor | None = None) -> Tensor:
    """Which of some scores stay, (n,) bool, when `int(share n)` go: the lowest, of equals the later.

    Args:
        scores: (n,); what is no finite number counts as 0.
        share: To remove.
        place: (n,), what is later among equals; the order itself if not given.
    """
    clean = scores.float().nan_to_num(0.0, 0.0, 0.0)
    go = int(share * len(clean) + 1e-6)
    stay = torch.ones(len(clean), dtype=torch.bool)
    order = torch.arange(len(clean)) if place is None else torch.sort(place, stable=True).indices
    order = order[torch.sort(clean[order], descending=True, stable=True).indices]
    stay[order[len(clean) - go :]] = False
    return stay


def decide(scores: Scores, cuts: Cuts) -> dict[str, Any]:
    """What stays, as plain data: `heads` and `neurons` as in `core.surgery.Structure`, `ranks` of each adapter left.

    `counts` says how many there were of each.

    Args:
        scores: From `score`; the larger stays.
        cuts: Shares that go.
    """
    held: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("heads", "share", "neurons", "module", "rank")}
    for key, value in scores.items():
        kind, _, name = key.partition("/")
        held[kind][name] = value
    share = {name: int(value) for name, value in held["share"].items()}
    heads = {}
    for name, values in held["heads"].items():
        units = _at_least_one(values, staying(values, cuts.heads))
        heads[name] = [unit * share[name] + i for unit in units for i in range(share[name])]
    neurons = {
        name: _at_least_one(held["neurons"][name], stay)
        for name, stay in _over_all(held["neurons"], cuts.neurons).items()
    }
    modules = staying(torch.stack(list(held["module"].values())), cuts.modules).tolist()
    left = {name: held["rank"][name] for name, stays in zip(held["module"], modules, strict=True) if stays}
    ranks = {name: stay.nonzero()[:, 0].tolist() for name, stay in _over_all(left, cuts.ranks).items() if stay.any()}
    counts = {
        "heads": sum(len(values) * share[name] for name, values in held["heads"].items()),
        "neurons": sum(map(len, held["neurons"].values())),
        "modules": len(held["module"]),
        "ranks": sum(map(len, held["rank"].values())),
    }
    return {"heads": heads, "neurons": neurons, "ranks": ranks, "counts": counts}


def _over_all(scores: Scores, share: float) -> dict[str, Tensor]:
    """`staying` over the scores of all layers together, by layer; equals go from the ends of all layers alike."""
    if not scores:
        return {}
    place = torch.cat([torch.arange(len(v)) / len(v) for v in scores.values()])
    stay = staying(torch.cat(list(scores.values())), share, place).split([len(v) for v in scores.values()])
    return dict(zip(scores, stay, strict=True))


def _at_least_one(scores: Tensor, stay: Tensor) -> list[int]:
    return stay.nonzero()[:, 0].tolist() or [int(scores.nan_to_num(0.0, 0.0, 0.0).argmax())]


@torch.no_grad()
def reduce(model: Any, plan: Mapping[str, Any], *, folding: bool = False) -> Any:
    """The plain model with what stays of the estimated adapter folded in, and everything else cut out.

    Args:
        model: PEFT model, as `score` took it; used up.
        plan: From `decide`.
        folding: Keep the factors of heads and neurons that stay.
    """
    for name, (_, low, masks) in _layers(model).items():
        if low is not None:
            gone = [j for j in range(low.rank) if j not in plan["ranks"].get(name, ())]
            low.B[:, gone] = 0
        if masks is not None and not folding:
            masks.factors.fill_(1)
    return prune(model.merge_and_unload(), Structure(plan["heads"], plan["neurons"]))
