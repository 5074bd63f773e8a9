"""Every Adapter and Prompt as a PEFT citizen, by one config, one tuner and one layer.

    from peft import get_peft_model
    model = get_peft_model(model, tunesmith.adapter("dylora", rank=8))

A PEFT adapter of ours is a stack of parts, applied in order, so that methods combine under one adapter name and are
saved in one folder. `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `load_adapter`, `set_adapter`,
`merge_and_unload`, `unload`, `disable_adapter` and `modules_to_save` are PEFT's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from tunesmith import __version__, catalog
from tunesmith.core import layer as layers
from tunesmith.core.adapter import Adapter, Changed, stacked
from tunesmith.core.prompt import Prompt, hook, space_of, unhook
from tunesmith.core.stats import Loss, collect, model_loss
from tunesmith.errors import ModelError, RecipeError

PEFT_TYPE = "TUNESMITH"
PREFIX = "tunesmith_"


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
    if "own-tuner" in found.tags:
        targets = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        return found.target({**common, **{k: v for k, v in targets.items() if v is not None}}, **checked)
    entry = {
        "name": slug,
        "options": checked,
        "target_modules": target_modules if isinstance(target_modules, str | None) else list(target_modules),
        "exclude_modules": exclude_modules if isinstance(exclude_modules, str | None) else list(exclude_modules),
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


class TunesmithLayer(nn.Module, BaseTunerLayer):
    """A layer with any number of named stacks of adapters around it; the input embedding also holds the prompts."""

    adapter_layer_names = ("tunesmith_adapters", "tunesmith_prompts")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spec = layers.describe(self.get_base_layer(), name)
        self.tunesmith_adapters = nn.ModuleDict()
        self.tunesmith_prompts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._original: tuple[Tensor, Tensor | None] | None = None

    def add(self, adapter_name: str, made: Adapter | Prompt) -> None:
        """Put one more part on top of the stack called `adapter_name`."""
        held = self.tunesmith_prompts if isinstance(made, Prompt) else self.tunesmith_adapters
        if adapter_name not in held:
            held[adapter_name] = nn.ModuleList()
        held[adapter_name].append(made)

    def active(self) -> list[Adapter]:
        """The adapters in force, nearest to the base first."""
        return self._in_force(self.tunesmith_adapters)

    def active_prompts(self) -> list[Prompt]:
        """The prompts in force, in the order in which they stand before the input."""
        return [] if self.disable_adapters else self._in_force(self.tunesmith_prompts)

    def _in_force(self, held: nn.ModuleDict) -> list[Any]:
        names = [name for name in self.active_adapters if name in held]
        return [made for name in names for made in held[name]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else self.active()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.training:
            for made in adapters:
                _check_ready(made)
        out = stacked(self.get_base_layer(), self.spec, adapters)(x)
        if torch.is_autocast_enabled(x.device.type):
            return out
        return out.to(x.dtype if x.is_floating_point() else self.spec.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold stacks into the base weight; the original is kept aside so that `unmerge` restores it bit for bit.

        Raises:
            ModelError: an adapter cannot be merged, the merged weight is not finite (with `safe_merge`), or a layer
                cannot hold the bias that the merged method needs.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        for name in wanted:
            if name in self.tunesmith_prompts:
                raise ModelError(
                    f"the adapter {name!r} holds a prompt ({type(self.tunesmith_prompts[name][0]).__name__}), which is "
                    "context and cannot be merged into weights; keep the adapter folder beside the model"
                )
        names = [n for n in wanted if n in self.tunesmith_adapters and n not in self.merged_adapters]
        if not names:
            return
        base = self.get_base_layer()
        adapters = [made for name in names for made in self.tunesmith_adapters[name]]
        for made in adapters:
            reason = unmergeable(made)
            if reason:
                raise ModelError(f"{type(made).__name__} on {self.spec.name!r} cannot be merged: {reason}")
        with torch.no_grad():
            W = layers.read_weight(base, self.spec)
            b = getattr(base, "bias", None)
            if self._original is None:
                # Writing back a quantised weight makes a new parameter, so the old one itself can be kept.
                kept = base.weight if self.spec.quantized else base.weight.detach().clone()
                self._original = (kept, None if b is None else b.detach().clone())
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            b = None if b is None else b.detach().to(torch.float32)
            for made in adapters:
                W, b = made.weight(W), made.bias(b)
            if safe_merge and not (bool(W.isfinite().all()) and (b is None or bool(b.isfinite().all()))):
                raise ModelError(f"merging {names} into {self.spec.name!r} gives values that are not finite")
            layers.write(base, self.spec, W, b)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight and bias back, exactly."""
        if not self.merged or self._original is None:
            return
        base = self.get_base_layer()
        weight, bias = self._original
        with torch.no_grad():
            if self.spec.quantized:
                base.weight = weight
            else:
                base.weight.copy_(weight)
            if bias is None:
                base.bias = None
            else:
                base.bias.copy_(bias)
        self.merged_adapters.clear()
        self._original = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        if adapter_name not in self.tunesmith_adapters:
            return False
        held = list(self.tunesmith_adapters[adapter_name])
        return len(held) == 1 and held[0].to_lora() is not None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' - W in the canonical shape, for PEFT's conversion of any tuner to LoRA."""
        W = layers.read_weight(self.get_base_layer(), self.spec)
        changed = stacked(self.get_base_layer(), self.spec, list(self.tunesmith_adapters[adapter_name]))
        return changed.weight - W


def _check_ready(made: Adapter) -> None:
    where = f"{type(made).__name__} on {made.layer.name!r}"
    if made.statistics and not made.prepared:
        raise ModelError(
            f"{where} starts from statistics of the data: call `tunesmith.initialise(model, batches)` before training"
        )
    if made.has_steps and not made.stepping:
        raise ModelError(
            f"{where} does something at every optimizer step: give the Trainer `callbacks=tunesmith.callbacks(model)`, "
            "or write `with tunesmith.step(model, n):` around each step of your own loop"
        )


def unmergeable(made: Adapter) -> str | None:
    """Why an adapter cannot be folded into its layer; None if it can."""
    probe = getattr(made, "unmergeable", None)
    return probe() if probe else None


class TunesmithModel(BaseTuner):
    """The PEFT tuner that injects our adapters and prompts."""

    prefix = PREFIX
    tuner_layer_cls = TunesmithLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: TunesmithConfig, model_config: dict) -> TunesmithConfig:
        return peft_config

    def _prepare_model(self, peft_config: TunesmithConfig, model: nn.Module) -> None:
        """Resolve every part's targets to full module names, so that the saved config needs no rule to be read."""
        layers.keep_codes_readable(model)
        union: set[str] = set()
        for entry in peft_config.parts:
            found = catalog.get(entry["name"])
            entry["options"] = found.validate(entry["options"])
            entry["target_modules"] = _resolve(found.target, entry, model)
            entry["exclude_modules"] = None
            union.update(entry["target_modules"])
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
            site = space_of(self.model, holder.get_base_layer()) if issubclass(cls, Prompt) else holder.spec
            holder.add(adapter_name, cls(site, **entry["options"]))
        if holder is not target:
            self._replace_module(parent, target_name, holder, target)
        if adapter_name not in self.active_adapters:
            holder.set_requires_grad(adapter_name, False)

    def _post_injection_hook(self, model: nn.Module, config: TunesmithConfig, adapter_name: str) -> None:
        if any(isinstance(m, Prompt) for m in model.modules()):
            hook(model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unhook(model)
        return model


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
    return done


def _resolve(cls: type, entry: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Full module names that one part changes.

    Raises:
        ModelError: a part matches no layer, or one that it cannot change.
    """
    names = {name: module for name, module in model.named_modules() if name and PREFIX not in name}
    wanted = entry["target_modules"]
    if wanted is None:
        found = cls.targets(model)
    elif wanted == "all-linear":
        found = Adapter.targets(model)
    else:
        found = [name for name in names if _matches(name, wanted) and not name.endswith(".base_layer")]
    excluded = entry.get("exclude_modules")
    if excluded:
        found = [name for name in found if not _matches(name, excluded)]
    if not found:
        some = ", ".join([n for n, m in names.items() if layers.kind_of(m) == "linear"][:6])
        raise ModelError(
            f"{entry['name']}: target_modules={wanted!r} matches no layer of {type(model).__name__}. "
            f"Its linear layers are called {some} ..."
        )
    return sorted(found)


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def register_peft() -> None:
    """Make `PeftModel.from_pretrained` know our adapter folders. Every function here that makes a config calls it."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = TunesmithConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = TunesmithModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


register_peft()
