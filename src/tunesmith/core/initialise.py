"""The start of adapters that begin from statistics of the data, and what layers share among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tunesmith import catalog
from tunesmith.core.adapter import Adapter, Changed, stacked
from tunesmith.core.stats import Loss, collect, model_loss
from tunesmith.core.tuner_layer import TunesmithLayer


def initialise(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    loss: Loss = model_loss,
    layers_per_pass: int | None = None,
) -> int:
    """Give every adapter that starts from statistics of the data its start. Call it once, before training.

    Args:
        model: A PEFT model with our adapters.
        batches: A few training batches, as keyword arguments of the model. Every process of a distributed run must
            give the same ones.
        loss: `(model, batch) -> scalar`; the model's own loss if not given.
        layers_per_pass: Read the batches several times, holding the sums of so many layers at a time.

    Returns:
        The number of adapters prepared; 0 if none wants statistics or all are prepared already.
    """
    held = {name: m for name, m in model.named_modules() if isinstance(m, TunesmithLayer)}
    wanting = {name: [a for a in layer.active() if a.statistics and not a.prepared] for name, layer in held.items()}
    wanting = {name: adapters for name, adapters in wanting.items() if adapters}
    if not wanting:
        return 0
    want = sorted({statistic for adapters in wanting.values() for a in adapters for statistic in a.statistics})
    bases = {name: f"{name}.base_layer" for name in wanting}
    for layer in held.values():
        layer.enable_adapters(False)
    try:
        found = collect(model, list(bases.values()), batches, want=want, loss=loss, layers_per_pass=layers_per_pass)
    finally:
        for layer in held.values():
            layer.enable_adapters(True)
    done = 0
    for name in wanting:
        layer = held[name]
        below = stacked(layer.get_base_layer(), layer.spec, [])
        for made in layer.active():
            if made in wanting[name]:
                made.prepare(below.weight.detach(), found[bases[name]])
                made.prepared.fill_(True)
                done += 1
            below = Changed(made, below)
    _arrange(model, held, [made for adapters in wanting.values() for made in adapters])
    return done


def _arrange(model: nn.Module, held: Mapping[str, TunesmithLayer], prepared: Sequence[Adapter]) -> None:
    """Let the methods share out what they have over layers, and make the PEFT configs say what came of it."""
    kinds: dict[tuple[type[Adapter], str], list[Adapter]] = {}
    for made in prepared:
        kinds.setdefault((type(made), made.group), []).append(made)
    for (cls, name), adapters in kinds.items():
        before = {made: getattr(made, "rank", None) for made in adapters}
        cls.arrange(adapters)
        if all(getattr(made, "rank", None) == rank for made, rank in before.items()):
            continue
        ranks: dict[str, int] = {made.layer.name: made.rank for made in adapters}
        for layer in held.values():
            layer.drop(name, [made for made in adapters if not ranks[made.layer.name]])
        config = model.peft_config[name]
        entry = next(e for e in config.parts if catalog.get(e["name"]).target is cls)
        entry["ranks"] = {n: r for n, r in ranks.items() if r}
        entry["target_modules"] = list(entry["ranks"])
        config.target_modules = {n for e in config.parts for n in e["target_modules"]}
