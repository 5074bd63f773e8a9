"""Rank tables: read off an adapter, or made from a model and rows by a method that shares out ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tunesmith import catalog, inputs
from tunesmith.core.layer import describe, read_weight
from tunesmith.core.lowrank import matrix_shape
from tunesmith.core.modelmap import block_linears
from tunesmith.core.ranks import RankTable, proportional
from tunesmith.core.stats import collect
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.engine import building
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models import loader
from tunesmith.recipe import Recipe

SENSITIVITY = "sensitivity"
"""Not a part: ranks in proportion to the mean |W dL/dW| of a layer's entries."""


def of_adapter(name: str) -> RankTable:
    """The rank of each layer that an adapter folder (or a run's) changes.

    Raises:
        ModelError: it is no adapter, or its change of a layer is not low rank.
    """
    loaded = loader.load_model(name)
    found = _ranks(loaded.model)
    if not found:
        raise ModelError(
            f"{name} holds no adapter with ranks; to make a table for a model, name the method: "
            f"`tunesmith ranks MODEL --method eva` ({', '.join(methods())})"
        )
    return RankTable(found, source=f"of the adapter {name}")


def methods() -> list[str]:
    """What shares out ranks: parts that arrange their layers, and `sensitivity`."""
    from tunesmith.core.adapter import Adapter

    parts = [p for p in catalog.in_room("adapters") if "rank" in p.options and "own-tuner" not in p.tags]
    sharing = [p.slug for p in parts if p.target.arrange.__func__ is not Adapter.arrange.__func__]
    return [*sharing, SENSITIVITY]


def by_method(recipe: Recipe, method: str, options: Mapping[str, Any]) -> RankTable:
    """A table for the recipe's model from its training rows.

    Args:
        recipe: Its `model` and `data` count, and the batch size.
        method: One of `methods()`.
        options: Of the part; `rank` is the mean over the layers.

    Raises:
        RecipeError: the method shares out no ranks.
    """
    if method not in methods():
        raise RecipeError(f"{method!r} shares out no ranks; these do: {', '.join(methods())}")
    if method == SENSITIVITY:
        return _by_sensitivity(recipe, int(options.get("rank", 8)))
    asked = recipe.model_copy(update={"adapters": [*_adapters(method, options)], "method": None})
    uses = asked.check()
    built = _built(asked, uses)
    names = [m.spec.name for m in built.model.modules() if isinstance(m, TunesmithLayer)]
    ranks = _ranks(built.model)
    return RankTable({name: ranks.get(name, 0) for name in names}, source=f"{method} on {recipe.data.train or 'rows'}")


def _adapters(method: str, options: Mapping[str, Any]) -> list[Any]:
    from tunesmith.recipe_fields import AdapterSpec

    return [AdapterSpec.model_validate({"name": method, **options})]


def _built(recipe: Recipe, uses: Mapping[str, Any]) -> building.Built:
    source = loader.resolve(recipe.model.name)
    config = loader.read_config(source, recipe.model.trust_remote_code)
    gathered = inputs.gather(recipe.data, config=config, task=recipe.task)
    processor = loader.load_processor(source, gathered.task, recipe.model.trust_remote_code)
    base = loader.load_base(
        source,
        gathered.task,
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        labels=gathered.labels,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return building.build(base, recipe, uses, gathered, config=config, processor=processor)


def _by_sensitivity(recipe: Recipe, rank: int) -> RankTable:
    asked = recipe.model_copy(update={"adapters": [], "prompts": [], "method": "full"})
    built = _built(asked, {})
    names = block_linears(built.model)
    batches = building.statistics_batches(built, recipe.train.batch_size)
    found = collect(built.model, names, batches, want=("gradient",))
    scores, costs, limits = {}, {}, {}
    for name in names:
        module = built.model.get_submodule(name)
        spec = describe(module, name)
        scores[name] = float((read_weight(module, spec).detach() * found[name]["gradient"]).abs().mean())
        costs[name], limits[name] = sum(matrix_shape(spec)), min(matrix_shape(spec))
    budget = rank * sum(costs.values())
    return RankTable(proportional(scores, costs, limits, budget), scores, source="sensitivity")


def _ranks(model: nn.Module) -> dict[str, int]:
    """Of the low-rank changes that a model's adapters make, as they would be exported."""
    found = {}
    for layer in (m for m in model.modules() if isinstance(m, TunesmithLayer)):
        exported = [made.to_lora() for made in layer.active()]
        if exported and all(e is not None for e in exported):
            found[layer.spec.name] = sum(e[1].shape[0] for e in exported if e is not None)
    for name, module in model.named_modules():
        held = getattr(module, "lora_A", None)
        if isinstance(held, nn.ModuleDict) and not isinstance(module, TunesmithLayer):
            found[name.removeprefix("base_model.model.")] = sum(a.weight.shape[0] for a in held.values())
    return found
