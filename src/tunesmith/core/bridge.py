"""Every Adapter and Prompt as a PEFT citizen, by one config, one tuner and one layer.

    from peft import get_peft_model
    model = get_peft_model(model, tunesmith.adapter("dylora", rank=8))

A PEFT adapter of ours is a stack of parts, applied in order, so that methods combine under one adapter name and are
saved in one folder. `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `load_adapter`, `set_adapter`,
`merge_and_unload`, `unload`, `disable_adapter` and `modules_to_save` are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from tunesmith import __version__, catalog
from tunesmith.core import layer as layers
from tunesmith.core.adapter import Adapter, Handle
from tunesmith.core.prompt import Prompt, hook, space_of, unhook
from tunesmith.core.ranks import RankTable
from tunesmith.core.side import Context
from tunesmith.core.targets import resolve, spec_of
from tunesmith.core.tuner_layer import PREFIX, TunesmithLayer
from tunesmith.errors import RecipeError

PEFT_TYPE = "TUNESMITH"


@dataclass
class TunesmithConfig(peft.PeftConfig):
    """The PEFT config of a stack of our parts.

    Attributes:
        parts: One mapping per part, nearest to the base first: `name` (slug), `options`, `target_modules` and
            `exclude_modules` (resolved to full module names when injected).
        target_modules: The union over the parts; filled in when injected.
        modules_to_save: Modules trained and saved whole, such as a classification head.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    tunesmith_version: str = __version__

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


def adapter(
    slug: str,
    *,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    ranks: RankTable | Mapping[str, int] | str | Path | None = None,
    **options: Any,
) -> peft.PeftConfig:
    """The PEFT config of one part of `adapters` or `prompts`, for `get_peft_model`.

    Args:
        slug: The part's name in the catalogue.
        target_modules: Names (a module matches if its path ends with one), or a regular expression for the whole
            path, or `"all-linear"`, or None for the part's own default.
        exclude_modules: Names or a regular expression to leave out.
        modules_to_save: Modules trained and saved whole beside the adapter.
        task_type: PEFT's task type, such as `"CAUSAL_LM"`.
        ranks: A rank per layer instead of one for all, and with it the layers: a table or its file (`core.ranks`).
        options: The part's options; `tunesmith show SLUG` lists them.

    Raises:
        RecipeError: no such part, or a wrong option.
    """
    register_peft()
    found = catalog.get(slug)
    if found.room not in ("adapters", "prompts"):
        raise RecipeError(f"{slug!r} is in the room {found.room}; only adapters and prompts attach to a model's layers")
    checked = found.validate(options)
    common: dict[str, Any] = {
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
        "task_type": task_type,
    }
    table = None if ranks is None else RankTable.load(ranks)
    if "own-tuner" in found.tags:
        if table is not None:
            common["ranks"] = dict(table)
        targets = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        return found.target({**common, **{k: v for k, v in targets.items() if v is not None}}, **checked)
    entry = {
        "name": slug,
        "options": checked,
        "target_modules": target_modules if isinstance(target_modules, str | None) else list(target_modules),
        "exclude_modules": exclude_modules if isinstance(exclude_modules, str | None) else list(exclude_modules),
        "ranks": None if table is None else dict(table),
    }
    return TunesmithConfig(parts=[entry], **common)


def stack(*configs: peft.PeftConfig) -> peft.PeftConfig:
    """Several parts under one adapter name, the first nearest to the base.

    Raises:
        RecipeError: one of them is injected by a PEFT tuner of its own.
    """
    if len(configs) == 1:
        return configs[0]
    for config in configs:
        if not isinstance(config, TunesmithConfig):
            raise RecipeError(
                f"{type(config).__name__} is injected by PEFT's own tuner, and PEFT takes one tuner per model: use it "
                "without other adapters or prompts"
            )
    first = configs[0]
    save = sorted({name for config in configs for name in config.modules_to_save or []})
    return TunesmithConfig(
        parts=[dict(entry) for config in configs for entry in config.parts],
        modules_to_save=save or None,
        task_type=first.task_type,
    )


class TunesmithModel(BaseTuner):
    """The PEFT tuner that injects our adapters and prompts."""

    prefix = PREFIX
    tuner_layer_cls = TunesmithLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["side_context"] = Context()  # layers are injected before nn.Module is ready
        self.__dict__["_wires"] = {}
        super().__init__(*args, **kwargs)

    side_context: Context
    _wires: dict[str, list[Handle]]

    def _prepare_adapter_config(self, peft_config: TunesmithConfig, model_config: dict) -> TunesmithConfig:
        return peft_config

    def _prepare_model(self, peft_config: TunesmithConfig, model: nn.Module) -> None:
        """Resolve every part's targets to full module names, so that the saved config needs no rule to be read."""
        layers.keep_codes_readable(model)
        union: set[str] = set()
        self._shared: dict[int, nn.Module | None] = {}
        for entry in peft_config.parts:
            found = catalog.get(entry["name"])
            entry["options"] = found.validate(entry["options"])
            entry["target_modules"] = resolve(found.target, entry, model)
            entry["exclude_modules"] = None
            union.update(entry["target_modules"])
            if issubclass(found.target, Adapter):
                specs = [spec_of(model.get_submodule(name), name) for name in entry["target_modules"]]
                self._shared[id(entry)] = found.target.survey(model, specs, entry["options"])
        peft_config.target_modules = union

    def _create_and_replace(
        self,
        peft_config: TunesmithConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        holder = target if isinstance(target, TunesmithLayer) else TunesmithLayer(target, current_key)
        for entry in peft_config.parts:
            if current_key not in entry["target_modules"]:
                continue
            cls = catalog.get(entry["name"]).target
            if issubclass(cls, Prompt):
                holder.add(adapter_name, cls(space_of(self.model, holder.get_base_layer()), **entry["options"]))
                continue
            own = {"rank": entry["ranks"][current_key]} if entry.get("ranks") else {}
            made: Adapter = cls(holder.spec, **{**entry["options"], **own})
            made.group, made.side_context = adapter_name, self.side_context
            made.join(self._shared[id(entry)], owner=current_key == entry["target_modules"][0])
            if made.starts_from_weight:
                made.prepare(holder.original_weight(), {})
            holder.add(adapter_name, made)
        if holder is not target:
            self._replace_module(parent, target_name, holder, target)
        if adapter_name not in self.active_adapters:
            holder.set_requires_grad(adapter_name, False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then what parts do beyond their layers, also for the second adapter and the ones after it."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if any(isinstance(m, Prompt) for m in model.modules()):
            hook(model)
        self.side_context.attach(model)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, TunesmithLayer) and adapter_name in layer.tunesmith_adapters:
                for made in layer.tunesmith_adapters[adapter_name]:
                    self._wires.setdefault(adapter_name, []).extend(made.wire(model, path))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for handle in self._wires.pop(adapter_name, []):
            handle.remove()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unhook(model)
        self.side_context.detach()
        for handle in (h for handles in self._wires.values() for h in handles):
            handle.remove()
        self._wires.clear()
        return model


def register_peft() -> None:
    """Make `PeftModel.from_pretrained` know our adapter folders. Every function here that makes a config calls it."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = TunesmithConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = TunesmithModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


register_peft()
